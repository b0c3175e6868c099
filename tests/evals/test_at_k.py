"""k of n samples: every expectation against all subsets; the bound against populations."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from moejax.evals import at_k, bootstrap, pass_at_k


def by_all_subsets(items, k, value):
    return float(np.mean([value(subset) for subset in itertools.combinations(items, k)]))


@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_best_at_k_is_the_mean_over_all_subsets(seed, k):
    rng = np.random.default_rng(seed)
    scores, values = rng.integers(0, 4, 7).astype(float), rng.standard_normal(7)

    def chosen(subset):
        best = max(scores[i] for i in subset)
        return np.mean([values[i] for i in subset if scores[i] == best])

    # Equal scores: here a tie is broken inside the subset, there by rank; the means agree.
    wanted = by_all_subsets(range(7), k, chosen)
    assert at_k.best_at_k(scores, values, k) == pytest.approx(wanted)


def test_best_at_k_with_values_as_scores_is_pass_at_k():
    for correct in range(11):
        values = np.arange(10) < correct
        for k in (1, 3, 10):
            wanted = float(pass_at_k.estimate(10, correct, k))
            assert at_k.best_at_k(values, values, k) == pytest.approx(wanted)
    assert at_k.best_at_k(np.arange(2000.0), np.ones(2000), 1000) == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(6))
def test_maj_at_k_is_the_mean_over_all_subsets(seed, k):
    rng = np.random.default_rng(seed)
    answers = [[None, "a", "b", "c", "d"][i] for i in rng.integers(0, 5, 8)]
    correct = {"a"} if seed % 2 else {"a", "c"}

    def share(subset):
        votes = Counter(answer for answer in subset if answer is not None)
        if not votes:
            return 0.0
        top = [answer for answer, num in votes.items() if num == max(votes.values())]
        return np.mean([answer in correct for answer in top])

    wanted = by_all_subsets(answers, k, share)
    assert at_k.maj_at_k(answers, correct, k) == pytest.approx(wanted)


def test_maj_at_k_of_many_samples():
    answers = ["a"] * 40 + ["b"] * 30 + list(range(30))
    assert at_k.maj_at_k(answers, {"a"}, 1) == pytest.approx(0.4)
    assert at_k.maj_at_k(answers, {"a"}, 100) == pytest.approx(1)
    share = at_k.maj_at_k(answers, {"a"}, 50)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        votes = Counter(answers[i] for i in rng.permutation(100)[:50])
        top = [answer for answer, num in votes.items() if num == max(votes.values())]
        drawn.append(np.mean([answer == "a" for answer in top]))
    assert abs(share - np.mean(drawn)) < 5 * np.std(drawn) / math.sqrt(2000)


def test_the_oracle_takes_the_most_frequent_answers():
    answers = ["a", "a", "a", "b", "b", "c", "d", None]
    assert at_k.oracle_at_k(answers, {"b"}, 1) == 0
    assert at_k.oracle_at_k(answers, {"b"}, 2) == 1
    assert at_k.oracle_at_k(answers, {"c"}, 3) == pytest.approx(0.5)
    assert at_k.oracle_at_k(answers, {"c", "d"}, 3) == 1
    assert at_k.oracle_at_k(answers, {"e"}, 8) == 0
    assert at_k.oracle_at_k([None], {"e"}, 1) == 0


def test_diversity():
    assert at_k.unique_share(["a", "a", "b", None]) == pytest.approx(2 / 3)
    assert at_k.unique_share([None]) == 0
    assert at_k.answer_entropy(["a", "b", "a", "b"]) == pytest.approx(math.log(2))
    assert at_k.answer_entropy(["a", "a"]) == 0 == at_k.answer_entropy([])


def test_the_variance_is_unbiased_where_the_plug_in_is_not():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        p = rng.beta(0.6, 1.0, 200)
        found.append(at_k.spread(6, rng.binomial(6, p)))
    true = 0.6 * 1.0 / (1.6**2 * 2.6)
    variances = np.array([s.variance for s in found])
    error = variances.std() / math.sqrt(len(found))
    assert abs(variances.mean() - true) < 4 * error
    assert np.mean([s.plug_in for s in found]) - true > 10 * error
    assert np.mean([s.bias for s in found]) == pytest.approx(1 - 0.6 / 1.6, abs=0.01)


@pytest.mark.parametrize("k", [2, 3, 4, 8, 32])
def test_the_bound_holds_for_every_population_and_is_equal_at_two(k):
    rng = np.random.default_rng(k)
    for _ in range(2000):
        p = rng.beta(*rng.uniform(0.05, 3, 2), rng.integers(2, 30))
        true = np.mean(1 - (1 - p) ** k)
        bound = at_k.pass_at_k_bound(1 - p.mean(), p.var(), k)
        assert true <= bound + 1e-12
        if k == 2:
            assert true == pytest.approx(bound, abs=1e-12)
    with pytest.raises(ValueError, match="reversed"):
        at_k.pass_at_k_bound(0.5, 0.1, 1)


def test_flip_test_against_all_signs_and_by_draws():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 9))
    signs = np.array(list(itertools.product([-1, 1], repeat=9)))
    wanted = np.mean(abs(signs @ (a - b)) >= abs((a - b).sum()) - 1e-12)
    assert bootstrap.flip_test(a, b) == pytest.approx(wanted)
    assert bootstrap.flip_test(a, a) == 1
    x = rng.standard_normal(200)
    assert bootstrap.flip_test(x + 1, x) == pytest.approx(1e-5, rel=0.01)
    assert bootstrap.flip_test(x, rng.permutation(x)) > 0.9
    # Of 0 and 1 it is McNemar's exact test.
    passed = rng.integers(0, 2, (2, 14)).astype(float)
    assert bootstrap.flip_test(*passed) == pytest.approx(bootstrap.sign_test(*passed))


def test_bad_input_is_a_value_error():
    for bad, said in [
        (lambda: at_k.best_at_k([1.0], [1.0], 2), "1 samples"),
        (lambda: at_k.best_at_k([1.0, float("nan")], [1.0, 0.0], 1), "not finite"),
        (lambda: at_k.best_at_k([1.0], [1.0, 0.0], 1), "one score per value"),
        (lambda: at_k.maj_at_k(["a"], {"a"}, 0), "k is 0"),
        (lambda: at_k.oracle_at_k(["a"], {"a"}, 0), "k is 0"),
        (lambda: at_k.spread(1, [0, 1]), "at least 2"),
        (lambda: at_k.spread(3, [0, 4]), "between 0 and 3"),
        (lambda: bootstrap.flip_test([1.0], [1.0, 2.0]), "same examples"),
    ]:
        with pytest.raises(ValueError, match=said):
            bad()


def test_drawn_majorities_agree_with_the_exact_ones_within_their_error():
    answers = ["a"] * 9 + ["b"] * 8 + ["c"] * 5 + [None] * 4
    for k in (1, 3, 10, 26):
        exact = at_k.maj_at_k(answers, {"a"}, k)
        mean, error = at_k.maj_at_k_drawn(answers, {"a"}, k, seed=k)
        assert abs(mean - exact) <= 4 * error + 1e-12
    with pytest.raises(ValueError, match="too few"):
        at_k.maj_at_k_drawn(answers, {"a"}, 3, draws=10)
    assert at_k.exact_is_feasible(256, 128) and not at_k.exact_is_feasible(2000, 1000)
