"""Intervals for what an evaluation measured, and for paired differences between two models.

Examples are the unit that is drawn again, since tokens of one example are not independent. Two
models are compared on the same examples, drawn together, so that what is hard for both cancels.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
_Z = 1.959963984540054  # the normal distribution's 97.5% point
_NUM_DRAWS, _CHUNK = 10_000, 500
_MOST_KEPT = 2_000  # examples whose draws are kept: 40 MB of them
_MAX_EXACT_FLIPS, _NUM_FLIPS = 16, 100_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its 95% confidence interval."""

    mean: float
    low: float
    high: float


def verdict(interval: Interval, *, lower_is_better: bool = False) -> str:
    """Returns "better" or "worse" for a difference, and "no gain" where its interval covers 0."""
    if interval.low <= 0 <= interval.high:
        return "no gain"
    return "better" if (interval.high < 0) == lower_is_better else "worse"


def mean(values: ArrayLike, *, seed: int = 0) -> Interval:
    """The mean of per-example values, percentile bootstrap over examples."""
    values = _checked(values)
    return ratio(values, np.ones_like(values), seed=seed)


def ratio(sums: ArrayLike, counts: ArrayLike, *, seed: int = 0) -> Interval:
    """sum(sums) / sum(counts), as in nats per token: each draw takes whole examples."""
    sums, counts = _checked(sums), _checked(counts)
    if len(sums) != len(counts) or counts.sum() <= 0:
        raise ValueError(f"{len(sums)} sums and {len(counts)} counts, which must not be all 0")
    draws = np.concatenate(
        [(w @ sums) / np.maximum(w @ counts, 1e-300) for w in _weights(len(sums), seed)]
    )
    return _interval(float(sums.sum() / counts.sum()), draws)


def of_means(
    columns: ArrayLike, statistic: Callable[[np.ndarray], np.ndarray], *, seed: int = 0
) -> tuple[float, float]:
    """95% bounds of a function of several means over the same examples, as a variance is one.

    columns: [examples, M]; statistic: means [draws, M] -> values [draws].
    """
    table = np.asarray(columns, np.float64)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise ValueError(f"finite columns [examples, M] are needed, got shape {table.shape}")
    draws = [statistic(w @ table / len(table)) for w in _weights(len(table), seed)]
    low, high = np.quantile(np.concatenate(draws), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def paired_mean(a: ArrayLike, b: ArrayLike, *, seed: int = 0) -> Interval:
    """mean(a) - mean(b) over the same examples in the same order."""
    a, b = _checked(a), _checked(b)
    if len(a) != len(b):
        raise ValueError(f"a pair needs the same examples: {len(a)} and {len(b)} were given")
    return mean(a - b, seed=seed)


def paired_ratio(
    sums_a: ArrayLike, sums_b: ArrayLike, counts: ArrayLike, *, seed: int = 0
) -> Interval:
    """(sum(sums_a) - sum(sums_b)) / sum(counts): the difference in nats per token.

    Both models have read the same tokens of the same examples, hence one `counts`.
    """
    a, b = _checked(sums_a), _checked(sums_b)
    if len(a) != len(b):
        raise ValueError(f"a pair needs the same examples: {len(a)} and {len(b)} were given")
    return ratio(a - b, counts, seed=seed)


def wilson(num_passed: int, num_tasks: int) -> Interval:
    """The share of tasks passed with Wilson's score interval (1927), good for few tasks too."""
    if not 0 <= num_passed <= num_tasks or num_tasks < 1:
        raise ValueError(f"{num_passed} of {num_tasks} is not a share of at least one task")
    share, n = num_passed / num_tasks, num_tasks
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    low = 0.0 if num_passed == 0 else middle - half
    return Interval(share, low, 1.0 if num_passed == n else middle + half)


def paired_share(passed_a: ArrayLike, passed_b: ArrayLike) -> Interval:
    """share(a) - share(b) of the same tasks passed, one sample each.

    Newcombe's interval from two Wilson intervals and the pairs' correlation (1998, method 10): it
    has a width even where the models agree on every task, which a bootstrap does not.
    """
    a, b = np.asarray(passed_a, bool), np.asarray(passed_b, bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"a pair needs the same tasks: {a.shape} and {b.shape} were given")
    n, both, only_a, only_b = len(a), int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum())
    neither = n - both - only_a - only_b
    share_a, share_b = wilson(both + only_a, n), wilson(both + only_b, n)
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    cross = float(both * neither - only_a * only_b)
    if cross > 0:
        cross = max(cross - n / 2, 0.0)
    correlation = cross / math.sqrt(product) if product else 0.0
    below_a, above_a = share_a.mean - share_a.low, share_a.high - share_a.mean
    below_b, above_b = share_b.mean - share_b.low, share_b.high - share_b.mean
    difference = (only_a - only_b) / n
    down = below_a**2 - 2 * correlation * below_a * above_b + above_b**2
    up = above_a**2 - 2 * correlation * above_a * below_b + below_b**2
    return Interval(
        difference,
        max(-1.0, difference - math.sqrt(max(down, 0.0))),
        min(1.0, difference + math.sqrt(max(up, 0.0))),
    )


def sign_test(passed_a: ArrayLike, passed_b: ArrayLike) -> float:
    """The exact two-sided p-value that neither model is better (McNemar's test, exact).

    Of the tasks that only one of them passed, each is the winner of half: a binomial tail.
    """
    a, b = np.asarray(passed_a, bool), np.asarray(passed_b, bool)
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def flip_test(a: ArrayLike, b: ArrayLike, *, seed: int = 0) -> float:
    """The two-sided p-value that two models are exchangeable on the same examples.

    If so, every difference has either sign with the same chance (Fisher's randomisation test). All
    2^m signs of the m differences that are not 0 are tried up to m = 16; else 100,000 are drawn and
    the observed ones count as one of them, so that p is never 0.
    """
    a, b = _checked(a), _checked(b)
    if len(a) != len(b):
        raise ValueError(f"a pair needs the same examples: {len(a)} and {len(b)} were given")
    gaps = (a - b)[a != b]
    if not len(gaps):
        return 1.0
    limit = abs(gaps.sum()) * (1 - 1e-12)
    if len(gaps) <= _MAX_EXACT_FLIPS:
        bits = np.arange(2 ** len(gaps))[:, None] >> np.arange(len(gaps)) & 1
        return float(np.mean(abs((2 * bits - 1) @ gaps) >= limit))
    rng, num_far = np.random.default_rng(seed), 0
    for _ in range(_NUM_FLIPS // _CHUNK):
        signs = rng.integers(0, 2, (_CHUNK, len(gaps)), np.int8) * 2.0 - 1
        num_far += int((abs(signs @ gaps) >= limit).sum())
    return (num_far + 1) / (_NUM_FLIPS + 1)


def _checked(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"one value per example is needed, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("a value is not finite")
    return array


def _weights(num_examples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each example is drawn, [draws, examples] at a time."""
    if num_examples > _MOST_KEPT:
        chunks = _drawn(num_examples, seed)
    else:
        chunks = iter(_kept(num_examples, seed))
    return (counts.astype(np.float64) for counts in chunks)


def _drawn(num_examples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    equal = np.full(num_examples, 1 / num_examples)
    for _ in range(_NUM_DRAWS // _CHUNK):
        yield rng.multinomial(num_examples, equal, size=_CHUNK).astype(np.int16)


@functools.lru_cache(maxsize=2)
def _kept(num_examples: int, seed: int) -> list[np.ndarray]:
    """The draws of one set of examples, which many measures share: to draw is what takes long."""
    return list(_drawn(num_examples, seed))


def _interval(value: float, draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    # Few or very skewed examples can put the estimate itself outside of the quantiles.
    return Interval(value, min(float(low), value), max(float(high), value))
