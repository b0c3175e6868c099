"""Sweeps: one program for every delta, arms drawn once, choices made where they should be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.evals import sweep
from moejax.evals.sweep import Answer, Arm, Criterion, Problem, Sweep
from moejax.serve.sampling import SamplingConfig

PLAIN = SamplingConfig(1.0)
PROBLEMS = [Problem(f"p{i}", (1, 2), i) for i in range(6)]


class Draws:
    """Answers whose share of right ones is the parameter itself."""

    def __init__(self):
        self.calls = 0

    def __call__(self, params, problems, num_samples, sampling, seed):
        self.calls += 1
        rate, rng = float(params["w"][0]), np.random.default_rng(seed)
        return [
            [
                Answer("t", str(int(rng.integers(3))), bool(rng.random() < rate), 0.5)
                for _ in range(num_samples)
            ]
            for _ in problems
        ]


def made(tmp_path, draws):
    late, early = {"w": jnp.full(4, 0.2)}, {"w": jnp.full(4, 0.9)}
    return Sweep(late, {"10": lambda: early}, draws, 8, tmp_path)


def test_an_arm_is_drawn_once_and_read_back_equal(tmp_path):
    draws = Draws()
    arm = Arm("10", 0.5, PLAIN)
    first = made(tmp_path, draws).sampled(arm, "test", PROBLEMS)
    again = made(tmp_path, draws).sampled(arm, "test", PROBLEMS)
    assert draws.calls == 1
    np.testing.assert_array_equal(first.correct, again.correct)
    assert first.answers == again.answers
    assert 0.3 < first.correct.mean() < 0.8  # w = 0.55
    assert made(tmp_path, draws).sampled(arm, "test", PROBLEMS[2:4]).ids == ("p2", "p3")
    with pytest.raises(InputError, match="other problems"):
        made(tmp_path, draws).sampled(arm, "test", [*PROBLEMS, Problem("new", (1,), 0)])


def test_all_deltas_share_one_program_and_the_ends_are_exact():
    early, late = ({"w": jax.random.normal(jax.random.key(i), (3, 5))} for i in range(2))
    sweep.mixed.clear_cache()
    for delta in np.linspace(0, 1, 11):
        found = sweep.mixed(early, late, jnp.float32(delta))["w"]
        wanted = delta * early["w"] + (1 - delta) * late["w"]
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert sweep.mixed._cache_size() == 1
    np.testing.assert_array_equal(sweep.mixed(early, late, jnp.float32(0))["w"], late["w"])
    np.testing.assert_array_equal(sweep.mixed(early, late, jnp.float32(1))["w"], early["w"])


@pytest.mark.parametrize("peak", [0.0, 0.31, 0.77, 1.0])
def test_search_closes_in_on_a_peak(peak):
    scores = sweep.search(lambda delta: -((delta - peak) ** 2), 9)
    assert len(scores) == 9 and all(0 <= d <= 1 for d in scores)
    assert abs(max(scores, key=lambda d: scores[d]) - peak) <= 1 / 32


def test_criterion_and_rows(tmp_path):
    arm = Arm("10", 0.25, SamplingConfig(0.7, top_p=0.9))
    assert arm.label == "10 0.25, T 0.7 top_p 0.9" and Arm("10", 0, PLAIN).label == "late, T 1"
    sampled = made(tmp_path, Draws()).sampled(arm, "val", PROBLEMS)
    criterion = Criterion.parse("pass@4")
    rows = sweep.rows_of(arm, "val", sampled, [1, 4])
    (row,) = [r for r in rows if r["measure"] == "pass" and r["k"] == 4]
    assert row["value"] == pytest.approx(criterion.values(sampled).mean())
    assert row["low"] <= row["value"] <= row["high"] and row["delta"] == 0.25
    for wrong in ("pass", "best@4", "pass@0", "pass@x"):
        with pytest.raises(InputError, match="pass@K or maj@K"):
            Criterion.parse(wrong)
    same = sweep.differences(sampled, sampled, [1])
    assert all(r["value"] == 0 and r["verdict"] == "no gain" and r["p"] == 1 for r in same)
