"""launch.wise --stage=sweep as a user runs it, and how it chooses."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from launch import wise_choice
from moejax.core import tree
from moejax.evals.sampled import Sampled
from moejax.evals.sweep import Arm, Criterion, Problem
from moejax.io.load import load_any
from moejax.serve.sampling import SamplingConfig
from tests import commands
from tests.launch import tiny_run


class Known:
    """A sweep whose every arm has a known share of right answers."""

    def __init__(self, best: str, delta: float):
        self.best, self.delta = best, delta
        self.asked: list[tuple[str, float, str]] = []

    def sampled(self, arm: Arm, split: str, problems) -> Sampled:
        self.asked.append((arm.early, arm.delta, split))
        rate = 0.2 + 0.6 * (arm.early == self.best) * (1 - abs(arm.delta - self.delta))
        rate *= arm.delta > 0
        rng = np.random.default_rng(0)
        correct = rng.random((len(problems), 8)) < rate + 0.1
        answers = tuple(tuple(str(int(c)) for c in row) for row in correct)
        return Sampled(tuple(p.id for p in problems), answers, correct)


def plan(**changes) -> wise_choice.Plan:
    fields = {
        "early": ("A", "B"), "late": "C",
        "samplings": (SamplingConfig(1.0), SamplingConfig(0.5)),
        "grid": (0.0, 0.5, 1.0), "points": 0, "criterion": Criterion("pass", 1),
        "ks": (1, 4), "num_samples": 8, "seed": 0,
    }
    return wise_choice.Plan(**fields | changes)


SPLITS = {
    "validation": [Problem(f"v{i}", (1,), 0) for i in range(20)],
    "test": [Problem(f"t{i}", (1,), 0) for i in range(30)],
}


@pytest.mark.parametrize("points", [0, 5])
def test_the_best_on_validation_is_chosen_and_reported_on_test(points):
    run = Known("B", 0.5)
    result, rows, sampled = wise_choice.measure(run, plan(points=points), SPLITS)
    assert result["chosen"]["early"] == "B" and abs(result["chosen"]["delta"] - 0.5) <= 0.25
    assert {split for _, delta, split in run.asked if delta in (0.25, 0.75)} <= {"validation"}
    assert all(ids.startswith("t") for s in sampled.values() for ids in s.ids)
    assert set(sampled) == {"late", "early", "chosen", "late, T 0.5"}
    gap = [r for r in result["differences"]["late"] if r["measure"] == "pass" and r["k"] == 1]
    assert gap[0]["verdict"] == "better" and gap[0]["p"] < 0.05
    assert {row["split"] for row in rows} == {"validation", "test"}


def test_a_sweep_from_the_command_line_twice(tmp_path):
    tiny_run.write(tmp_path)
    flags = [
        "--stage=sweep", f"--early={tmp_path / 'early'}", f"--late={tmp_path / 'late'}",
        "--task=gsm8k", f"--data={tmp_path / 'sums.jsonl'}", f"--out={tmp_path / 'sweep'}",
        "--num_samples=4", "--k=1,4", "--criterion=pass@4", "--max_new_tokens=4",
        "--delta_grid=0,0.5,1", "--sampling=temperature=1", "--sampling=temperature=0.7,top_k=5",
    ]
    done = commands.run("wise", *flags)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "sweep"
    found = json.loads((folder / "sweep.json").read_text())
    assert found["chosen"]["delta"] in (0, 0.5, 1)
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert {"pass", "maj", "best", "oracle", "bias", "variance", "unique"} <= {
        row["measure"] for row in rows
    }
    assert len(list((folder / "plots").glob("*.png"))) == 5
    drawn = {p: p.stat().st_mtime_ns for p in (folder / "samples").iterdir()}
    again = commands.run("wise", *flags)
    assert again.returncode == 0 and "draw " not in again.stdout
    assert {p: p.stat().st_mtime_ns for p in drawn} == drawn
    other = commands.run("wise", *flags, "--num_samples=5")
    assert other.returncode == 2 and "another config" in other.stderr


def test_a_greedy_soup_from_the_command_line_and_again(tmp_path):
    tiny_run.write(tmp_path)
    models = [str(tmp_path / name) for name in ("early", "late")]
    flags = [
        "--stage=soup", f"--models={','.join(models)}", "--task=gsm8k",
        f"--data={tmp_path / 'sums.jsonl'}", f"--out={tmp_path / 'soup'}", "--num_samples=2",
        "--criterion=pass@2", "--max_new_tokens=4",
    ]
    done = commands.run("wise", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "soup" / "soup.json").read_text())
    score = {tuple(sorted(one["models"])): one["score"] for one in found["tried"]}
    assert len(score) == 3
    best = max(models, key=lambda name: score[name,])  # of equal ones the first
    both = score[tuple(sorted(models))] >= score[best,]
    assert found["members"] == ([best] + [m for m in models if m != best] if both else [best])
    made, parts = load_any(tmp_path / "soup" / "model"), [load_any(m) for m in found["members"]]
    for path, leaf in tree.flatten(made.params).items():
        wanted = np.mean([tree.flatten(part.params)[path] for part in parts], axis=0)
        np.testing.assert_allclose(leaf, wanted, rtol=1e-6, atol=1e-7)
    again = commands.run("wise", *flags, "--overwrite")
    assert again.returncode == 0 and "draw " not in again.stdout
    refused = commands.run("wise", *flags)
    assert refused.returncode == 2 and "exists" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--stage=soup", "--models=A"], "at least two --models"),
        (["--stage=soup", "--models=A,B", "--criterion=pass@99"], "--num_samples=16"),
        (["--late=B"], "needs --early"),
        (["--early=A", "--late=B", "--k=32"], "--num_samples=16"),
        (["--early=A", "--late=B", "--criterion=best"], "pass@K or maj@K"),
        (["--early=A", "--late=B", "--sampling=top_q=1"], "'top_q=1' is none of"),
    ],
)
def test_what_cannot_be_swept_is_one_line(flags, said, tmp_path):
    done = commands.run("wise", "--stage=sweep", f"--out={tmp_path / 'x'}", *flags)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()
