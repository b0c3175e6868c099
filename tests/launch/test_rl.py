"""launch.rl as a user runs it, stopped in the middle, and what earns a reward."""

from __future__ import annotations

import json

import pytest

from configs import rl_gsm8k
from launch import rl_run as rl
from moejax.core.errors import InputError
from moejax.evals.tasks import TASKS, Grading
from moejax.evals.tasks.base import Grade, Item
from tests import commands
from tests.launch import tiny_run


def test_two_iterations_from_the_command_line_and_one_more(tmp_path):
    tiny_run.write(tmp_path)
    flags = [
        "--config=configs/rl_gsm8k.py", f"--config.model.source={tmp_path / 'late'}",
        f"--config.data.path={tmp_path / 'sums.jsonl'}", f"--workdir={tmp_path / 'rl'}",
        "--config.rl.prompts=2", "--config.rl.answers=4", "--config.rl.max_answer=4",
        "--config.data.heldout=2", "--config.rl.minibatches=2", "--config.train.save_every=1",
    ]
    done = commands.run("rl", *flags, "--config.rl.iterations=2")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "rl"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "reward" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    assert all({"kl", "entropy", "length", "clipped"} <= r.keys() for r in steps)
    assert any("eval/solved" in r for r in records)
    sample = json.loads((folder / "rollouts" / "samples_000001.jsonl").read_text().splitlines()[0])
    assert {"id", "completion", "reward", "problem"} <= sample.keys()
    assert (folder / "curves.png").stat().st_size > 5000
    assert (folder / "model" / "lineage.json").is_file()
    dry = commands.run("rl", *flags, "--config.data.heldout=9", "--dry_run")
    assert dry.returncode == 2 and "leaves fewer than the 2 of an iteration" in dry.stderr


class Judge:
    """Grades as it is told, whatever is asked."""

    def __init__(self, *grades: Grade):
        self.grades = grades

    def grade(self, asked, answers):
        return [("", None, grade) for grade in self.grades]


def test_only_a_pass_beyond_doubt_is_rewarded():
    grades = Grade("pass"), Grade("wrong"), Grade("pass", weak=True), Grade("timeout")
    reward = rl.make_reward(Judge(*grades), [Item("a", {})])
    assert reward([0] * 4, [[1]] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_evaluations_and_checkpoints_fall_between_iterations():
    config = rl_gsm8k.get_config()
    config.rl.update({"epochs": 2, "minibatches": 4, "iterations": 3})
    run = rl.train_config(config, rl.rl_config(config))
    assert (run.steps, run.save_every, run.eval_every) == (24, 40, 80)
    config.rl.iterations = 0
    with pytest.raises(InputError, match="iterations"):
        rl.rl_config(config)


ATTEMPTS = [
    "The answer is 16, 17, 18, 19 or 20.",
    "#### 18 #### 19\n#### 17",
    "#### 17\n#### 18\n#### 19",
    "\\boxed{18} \\boxed{19}",
    "\\boxed{17, 18}",
    "#### 17 or 18",
    "#### 10-20",
    "#### " + " ".join(map(str, range(100))),
    "#### 9+9",
    "#### x = x",
    "#### nan",
    "#### inf",
    "#### 1\u200b8",
    "9+9?",
    "####",
    "",
    "The answer is 18. No wait, the answer is 17.",
    "#### -18",
    "#### 0x12",
]


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_attempts_to_earn_without_answering_earn_nothing(attempt):
    """Lists, hedges and revisions that hold the right number somewhere; code: tests/evals."""
    task = TASKS["gsm8k"]
    item = task.make({"question": "9+9?", "answer": "#### 18"}, 0, "here")
    form = task.form(None)
    honest, tried = task.grade(
        [(item, task.extract(item, form, text)) for text in ("#### 18", attempt)], Grading()
    )
    assert honest.passed and not tried.passed
