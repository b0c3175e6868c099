"""Tables of graded samples: against the definitions, on populations where all is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moejax.evals import bootstrap
from moejax.evals.at_k import pass_at_k_bound
from moejax.evals.sampled import Sampled, measures


def made(num_problems: int = 6, n: int = 5, seed: int = 0) -> Sampled:
    rng = np.random.default_rng(seed)
    answers = rng.integers(0, 4, (num_problems, n))
    rows = tuple(tuple(None if a == 3 else int(a) for a in row) for row in answers)
    correct = np.array([[a == 1 for a in row] for row in rows])
    ids = tuple(f"p{i}" for i in range(num_problems))
    return Sampled(ids, rows, correct, rng.normal(size=(num_problems, n)), "a draw")


def values(sampled: Sampled, ks) -> dict[tuple[str, int], float]:
    return {(m.name, m.k): m.value.mean for m in measures(sampled, ks)}


def test_measures_are_means_over_all_subsets():
    sampled = made()
    found = values(sampled, [1, 3])
    passed, best = [], []
    for correct, scores in zip(sampled.correct, sampled.scores, strict=True):
        subsets = [list(s) for s in itertools.combinations(range(5), 3)]
        passed.append(np.mean([correct[s].any() for s in subsets]))
        best.append(np.mean([correct[s][np.argmax(scores[s])] for s in subsets]))
    assert found["pass", 3] == pytest.approx(np.mean(passed), abs=1e-12)
    assert found["best", 3] == pytest.approx(np.mean(best), abs=1e-12)
    assert found["pass", 1] == pytest.approx(sampled.correct.mean())
    assert found["maj", 1] == pytest.approx(sampled.correct.mean())
    answered = np.mean([[a is not None for a in row] for row in sampled.answers])
    assert found["answered", 0] == pytest.approx(answered)
    assert found["bias", 0] == pytest.approx(1 - sampled.correct.mean())


def test_bound_is_drawn_from_k_2_on_and_met_at_2_by_a_population():
    rng = np.random.default_rng(1)
    p = rng.beta(0.4, 0.6, 400)
    correct = rng.random((400, 64)) < p[:, None]
    rows = tuple(tuple(int(c) for c in row) for row in correct)
    found = values(Sampled(tuple(map(str, range(400))), rows, correct), [1, 2, 8])
    assert ("bound", 1) not in found
    # At k = 2 the bound is an equality of population moments; both sides are estimates here.
    assert found["bound", 2] == pytest.approx(found["pass", 2], abs=0.004)
    assert found["bound", 8] > found["pass", 8]
    bound = pass_at_k_bound(found["bias", 0], found["variance", 0], 8)
    assert found["bound", 8] == bound


def test_interval_of_a_variance_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(60):
        x = rng.normal(size=80)
        low, high = bootstrap.of_means(
            np.stack([x, x * x], 1), lambda m: m[:, 1] - m[:, 0] ** 2, seed=trial
        )
        covered += low <= 1 <= high
    assert 46 <= covered <= 60  # 95% intervals of a percentile bootstrap are a little too narrow


def test_what_does_not_fit_is_refused():
    sampled = made()
    with pytest.raises(ValueError, match="choose 1 <= k <= 5"):
        measures(sampled, [6])
    with pytest.raises(ValueError, match="twice"):
        Sampled(("a", "a"), sampled.answers[:2], sampled.correct[:2])
    with pytest.raises(ValueError, match="scores"):
        Sampled(sampled.ids, sampled.answers, sampled.correct, np.zeros((1, 1)))
    assert sampled.take([2, 4]).ids == ("p2", "p4")
