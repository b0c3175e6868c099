"""Intervals cover as often as they say, are paired, and say "no gain" where they cover 0."""

from math import comb

import numpy as np
import pytest

from moejax.evals import bootstrap
from moejax.evals.bootstrap import Interval, verdict


def test_the_estimate_is_the_plain_one_and_lies_inside():
    rng = np.random.default_rng(0)
    sums, counts = rng.gamma(2, 10, 40), rng.integers(1, 30, 40)
    interval = bootstrap.ratio(sums, counts)
    assert interval.mean == pytest.approx(sums.sum() / counts.sum())
    assert interval.low < interval.mean < interval.high
    assert bootstrap.mean(sums).mean == pytest.approx(sums.mean())


def test_the_same_seed_gives_the_same_interval():
    values = np.arange(20.0)
    assert bootstrap.mean(values, seed=3) == bootstrap.mean(values, seed=3)
    assert bootstrap.mean(values, seed=3) != bootstrap.mean(values, seed=4)


def test_the_width_is_that_of_the_standard_error():
    values = np.random.default_rng(1).normal(size=400)
    interval = bootstrap.mean(values)
    expected = 2 * 1.96 * values.std() / np.sqrt(len(values))
    assert interval.high - interval.low == pytest.approx(expected, rel=0.05)


def test_examples_are_drawn_and_not_tokens():
    """An example with many tokens counts by its tokens, but comes and goes as a whole."""
    sums, counts = np.array([100.0, 1, 1, 1]), np.array([100.0, 1, 1, 1])
    assert bootstrap.ratio(sums, counts) == Interval(1.0, 1.0, 1.0)
    mixed = bootstrap.ratio(np.array([200.0, 1, 1, 1]), counts)
    assert mixed.low == pytest.approx(1.0) and mixed.high > 1.9


def test_the_bootstrap_covers():
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(60):
        counts = rng.integers(5, 50, 64).astype(float)
        level = rng.gamma(4, 0.5, 64)  # nats per token of each example
        interval = bootstrap.ratio(level * counts, counts, seed=trial)
        hits += interval.low <= 2.0 <= interval.high
    assert hits / 60 >= 0.86  # 0.95 less three standard errors of 60 trials


def test_pairing_cancels_what_is_hard_for_both():
    rng = np.random.default_rng(3)
    hard = rng.gamma(2, 20, 60)
    counts = np.full(60, 10.0)
    better = hard - 0.5 + rng.normal(0, 0.1, 60)
    interval = bootstrap.paired_ratio(better, hard, counts)
    assert interval.mean == pytest.approx((better - hard).sum() / 600)
    assert verdict(interval, lower_is_better=True) == "better"
    alone = bootstrap.ratio(hard, counts)
    assert interval.high - interval.low < 0.05 * (alone.high - alone.low)
    swapped = bootstrap.paired_ratio(hard, better, counts)
    assert verdict(swapped, lower_is_better=True) == "worse"
    assert bootstrap.paired_mean(hard, hard) == Interval(0.0, 0.0, 0.0)


def test_verdicts():
    assert verdict(Interval(0.1, 0.05, 0.2)) == "better"
    assert verdict(Interval(-0.1, -0.2, -0.05)) == "worse"
    assert verdict(Interval(-0.1, -0.2, -0.05), lower_is_better=True) == "better"
    for low, high in [(-0.1, 0.2), (0.0, 0.2), (-0.2, 0.0), (0.0, 0.0)]:
        assert verdict(Interval((low + high) / 2, low, high)) == "no gain"


def test_wilson_against_its_published_values():
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20 and 1 of 29."""
    for passed, tasks, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        interval = bootstrap.wilson(passed, tasks)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)
        assert interval.mean == passed / tasks
    assert bootstrap.wilson(20, 20).high == 1.0


def coverage(p_both: float, p_a: float, p_b: float, n: int) -> float:
    rng = np.random.default_rng(4)
    draws = rng.choice(4, size=(400, n), p=[p_both, p_a, p_b, 1 - p_both - p_a - p_b])
    intervals = [bootstrap.paired_share(d < 2, (d == 0) | (d == 2)) for d in draws]
    return np.mean([i.low <= p_a - p_b <= i.high for i in intervals])


@pytest.mark.parametrize(
    "p", [(0.5, 0.1, 0.1), (0.3, 0.2, 0.05), (0.05, 0.02, 0.0), (0.9, 0.05, 0)]
)
def test_paired_shares_cover(p):
    assert coverage(*p, n=32) >= 0.92  # 0.95 less three standard errors of 400 trials


def test_paired_shares_have_a_width_even_where_models_agree():
    passed = np.arange(32) < 10
    interval = bootstrap.paired_share(passed, passed)
    assert interval.mean == 0 and interval.low < 0 < interval.high
    assert verdict(interval) == "no gain"
    ab, ba = bootstrap.paired_share(passed, ~passed), bootstrap.paired_share(~passed, passed)
    assert (ab.mean, ab.low, ab.high) == pytest.approx((-ba.mean, -ba.high, -ba.low))
    everything = bootstrap.paired_share(np.ones(10), np.zeros(10))
    assert everything.mean == 1 and everything.low > 0.5 and everything.high == 1
    assert bootstrap.paired_share(passed, passed | (np.arange(32) < 30)).mean == -20 / 32


def test_the_sign_test_is_the_exact_binomial_tail():
    for wins, losses in [(0, 0), (5, 0), (3, 1), (4, 4), (10, 2)]:
        a = np.array([1] * wins + [0] * losses + [1, 0])
        b = np.array([0] * wins + [1] * losses + [1, 0])
        n = wins + losses
        total = sum(comb(n, i) for i in range(n + 1) if abs(i - n / 2) >= abs(wins - n / 2))
        assert bootstrap.sign_test(a, b) == pytest.approx(total / 2**n)
        assert bootstrap.sign_test(b, a) == bootstrap.sign_test(a, b)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap.mean([]),
        lambda: bootstrap.mean([1.0, float("nan")]),
        lambda: bootstrap.mean([[1.0]]),
        lambda: bootstrap.ratio([1.0], [1.0, 2.0]),
        lambda: bootstrap.ratio([1.0], [0.0]),
        lambda: bootstrap.paired_mean([1.0], [1.0, 2.0]),
        lambda: bootstrap.paired_ratio([1.0, 2.0], [1.0], [1.0, 1.0]),
        lambda: bootstrap.paired_share([True], [True, False]),
        lambda: bootstrap.wilson(3, 2),
        lambda: bootstrap.wilson(0, 0),
    ],
)
def test_what_makes_no_pair_or_share_is_refused(call):
    with pytest.raises(ValueError):
        call()
