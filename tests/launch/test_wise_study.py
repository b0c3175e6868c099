"""The study of WiSE-FT: its data and grader at full speed, every stage once at a tiny size."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from configs.wise import study
from launch import wise_arms, wise_study_report, wise_training
from launch.wise_training import EOS, Lab, decode, encode, rows_of
from moejax.data.countdown import solves
from moejax.evals.sampled import Sampled
from moejax.models import transformer
from moejax.train.loss import lm_loss
from tests import commands


@pytest.fixture(scope="module")
def lab():
    return Lab.of(study.get_config("tiny"))


def test_splits_share_no_problem_and_every_taught_derivation_is_right(lab):
    problems = [p for p, _ in (*lab.tune, *lab.validation, *lab.test)]
    keys = {(tuple(sorted(p.numbers)), p.target) for p in problems}
    assert len(keys) == len(problems) == 40 + 12 + 16
    assert all(solves(problem, text) for problem, text in lab.tune)


def test_rows_hold_problems_side_by_side_and_the_loss_is_theirs(lab):
    problem, text = lab.tune[0]
    one = rows_of([(problem, text)])
    ids, counts = one["tokens"][0], one["loss_mask"][0] > 0
    counted = ids[counts]
    assert decode(counted) == text and counted[-1] == EOS
    assert decode(ids[: int(np.argmax(counts))]) == problem.prompt
    assert lab.grade(problem, counted).correct
    assert not lab.grade(problem, encode(text[:-1]) + [EOS]).correct
    assert decode(encode("1+2=3") + [EOS] + encode("4")) == "1+2=3"

    params = transformer.init_params(lab.model, jax.random.key(0))
    loss = jax.jit(lambda rows: lm_loss(params, lab.model, rows, jax.random.key(1))[0])
    alone = [rows_of([pair]) for pair in lab.tune[:5]]
    sizes = [float(rows["loss_mask"].sum()) for rows in alone]
    together = rows_of(lab.tune[:5])
    assert len(together["tokens"]) == 1 and together["loss_mask"].sum() == sum(sizes)
    expected = np.average([loss(rows) for rows in alone], weights=sizes)
    np.testing.assert_allclose(loss(together), expected, rtol=1e-5)


def test_a_tree_goes_to_disk_and_back(lab, tmp_path):
    params = {"a": {"b": np.arange(3.0, dtype=np.float32)}}
    wise_training.save_tree(tmp_path / "t.npz", params)
    found = wise_training.load_tree(tmp_path / "t.npz", params)
    np.testing.assert_array_equal(found["a"]["b"], params["a"]["b"])
    with pytest.raises(Exception, match="another model"):
        wise_training.load_tree(tmp_path / "t.npz", {"a": {"b": np.zeros(4, np.float32)}})


def test_matched_temperature_is_read_between_those_drawn():
    config = study.get_config("tiny")
    chosen = wise_arms.Arm("step 1", 0.5, wise_arms.PLAIN)
    arms = wise_arms.test_arms(config, chosen, ["step 1"])
    values = {"late": (0.4, 0.6), "late T 0.7": (0.5, 0.5), "chosen": (0.45, 0.7),
              "chosen T 1.3": (0.35, 0.8)}
    rows = [
        {"arm": arm, "measure": "pass", "k": k, "value": value}
        for arm, pair in values.items()
        for k, value in zip((1, 4), pair, strict=True)
    ]
    seed = wise_arms.Seed(0, [1, 2], chosen, arms, {}, rows)
    found = {row.pop("pass@1"): row for row in wise_study_report.matched(seed, 4)["rows"]}
    assert found[0.45]["late pass@4"] == pytest.approx(0.55)
    assert found[0.45]["chosen pass@4"] == 0.7
    assert found[0.4] == {"late pass@4": 0.6, "chosen pass@4": pytest.approx(0.75)}
    assert found[0.35]["late pass@4"] is None and found[0.5]["chosen pass@4"] is None


def test_pooled_tables_are_means_over_seeds_and_paired_by_problem():
    config = study.get_config("tiny")
    chosen = wise_arms.Arm("step 1", 0.5, wise_arms.PLAIN)
    arms = wise_arms.test_arms(config, chosen, ["step 1"])

    def seed(number: int, late: list[list[bool]], better: list[list[bool]]):
        found = {}
        for name in arms:
            correct = np.array(better if name in ("chosen", "GRPO from chosen") else late)
            answers = tuple(tuple("yes" if ok else "no" for ok in row) for row in correct)
            found[name] = Sampled(("a", "b"), answers, correct)
        return wise_arms.Seed(number, [1, 2], chosen, arms, found, [])

    none, half, whole = [False] * 4, [True, True, False, False], [True] * 4
    seeds = [seed(0, [none, half], [half, half]), seed(1, [none, half], [half, whole])]
    rows = {row["arm"]: row for row in wise_study_report.pooled(seeds, 4)}
    assert rows["late"]["pass@1"]["mean"] == pytest.approx(0.25)
    assert rows["chosen"]["pass@1"]["of seeds"] == [0.5, 0.75]
    assert rows["chosen"]["pass@4"]["mean"] == pytest.approx(1)
    gaps = wise_study_report.pooled_differences(seeds, (1, 4))
    late = {row["k"]: row for row in gaps if row["second"] == "late"}
    assert late[1]["mean"] == pytest.approx(0.375) and late[4]["mean"] == pytest.approx(0.5)
    assert late[1]["low"] == pytest.approx(0.25) and late[1]["high"] == pytest.approx(0.5)
    summary = {"pooled": list(rows.values()), "pooled differences": gaps}
    assert "| chosen - late | 4 | +0.500 [" in wise_study_report.as_markdown(summary, 4)


@pytest.mark.slow
def test_every_stage_and_again(tmp_path):
    asked = ["wise_study", f"--workdir={tmp_path}", "--config=configs/wise/study.py:tiny"]
    first = commands.run(*asked)
    assert first.returncode == 0, first.stderr
    found = json.loads((tmp_path / "study.json").read_text())
    assert set(found) == {"facts", "chosen", "collapse", "differences", "rl", "matched", "pooled",
                          "pooled differences"}
    assert len(list((tmp_path / "plots").glob("*.png"))) == 4
    samples = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("samples/*.jsonl")}
    assert len(samples) == 17
    again = commands.run(*asked)
    assert again.returncode == 0 and "test:" not in again.stdout
    assert {p: p.stat().st_mtime_ns for p in samples} == samples
    assert json.loads((tmp_path / "study.json").read_text()) == found
