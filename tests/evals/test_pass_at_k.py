"""Pass@k against its definition: draws without replacement, in exact arithmetic."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from moejax.evals.pass_at_k import estimate


def exact(n: int, c: int, k: int) -> Fraction:
    return 1 - Fraction(comb(n - c, k), comb(n, k))


def test_it_is_the_exact_ratio_of_binomials():
    for n in range(1, 13):
        for k in range(1, n + 1):
            found = estimate(np.full(n + 1, n), np.arange(n + 1), k)
            wanted = [float(exact(n, c, k)) for c in range(n + 1)]
            np.testing.assert_allclose(found, wanted, rtol=1e-13, atol=1e-15)


def test_it_is_stable_for_many_samples():
    for n, c, k in [(200, 3, 100), (1000, 1, 999), (100_000, 5, 64), (10_000, 0, 100)]:
        np.testing.assert_allclose(estimate(n, c, k), float(exact(n, c, k)), rtol=1e-10)


def test_it_is_the_papers_product_on_random_counts():
    """Chen et al. 2021, arXiv 2107.03374, section 2.1: what human-eval computes."""
    rng = np.random.default_rng(0)
    n = rng.integers(1, 300, 500)
    c, k = rng.integers(0, n + 1), rng.integers(1, n + 1)
    for one in zip(n, c, k, strict=True):
        left = one[0] - one[1]
        product = np.prod(1 - one[2] / np.arange(left + 1, one[0] + 1))
        wanted = 1.0 if left < one[2] else 1 - product
        np.testing.assert_allclose(estimate(*one), wanted, rtol=1e-12, atol=1e-15)


def test_published_values():
    """The worked example of the references: n 10, c 3."""
    assert estimate(10, 3, 1) == pytest.approx(0.3)
    assert estimate(10, 3, 5) == pytest.approx(0.916667, abs=1e-6)


def test_it_is_unbiased():
    """Its mean over c ~ Binomial(n, p) is 1 - (1 - p)^k, exactly."""
    n, k = 9, 4
    for p in (0.1, 0.5, 0.9):
        mean = sum(
            comb(n, c) * p**c * (1 - p) ** (n - c) * float(estimate(n, c, k)) for c in range(n + 1)
        )
        assert mean == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


def test_shapes_broadcast():
    assert estimate(10, [0, 5, 10], 2).shape == (3,)
    assert estimate([[10], [20]], [1, 2, 3], 2).shape == (2, 3)
    assert estimate([], [], 1).shape == (0,)


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (3, 1, 4, "k is 4 but a task has 3 samples"),
        ([9, 2], [1, 1], 5, "k is 5 but a task has 2"),
        (3, 1, 0, "at least 1"),
        (3, 4, 1, "between 0 and"),
        (3, -1, 1, "between 0 and"),
        (3.5, 1, 1, "integers"),
    ],
)
def test_impossible_requests_are_refused(n, c, k, message):
    with pytest.raises(ValueError, match=message):
        estimate(n, c, k)
