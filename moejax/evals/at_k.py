"""What k samples of one problem are worth: chosen by a score, by a vote, by an oracle; diversity.

All are expectations over a random k-subset of the n samples that were drawn, computed exactly and
not by drawing subsets (but for `maj_at_k_drawn`, with its standard error). Answers are compared as
they are given: normalise them first. None is a
sample without an answer; it never wins a vote.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

Answers = Sequence[Hashable | None]


def best_at_k(scores: ArrayLike, values: ArrayLike, k: int) -> float:
    """The expected value of the sample with the highest score among k of n.

        sum_r C(r - 1, k - 1) / C(n, k) v_(r),   v_(r) the value of the r-th lowest score

    Args:
      scores: [n] of what chooses (a reward model, a mean log-probability; name it where it is
        reported). Equal scores share their ranks' chances equally.
      values: [n] of what counts, 1 for a sample that passed.
      k: size of the subset. With the values as scores this is Pass@k.
    """
    scores, values = np.asarray(scores, np.float64), np.asarray(values, np.float64)
    if scores.shape != values.shape or scores.ndim != 1:
        raise ValueError(f"one score per value is needed: {scores.shape} and {values.shape}")
    if not np.isfinite(scores).all() or not np.isfinite(values).all():
        raise ValueError("a score or value is not finite")
    n = len(values)
    _check_k(k, n)
    order = np.argsort(scores, kind="stable")
    # C(r-1, k-1) / C(n, k), from the largest rank down: large binomials never appear.
    chances = np.zeros(n)
    chances[n - 1] = k / n
    for rank in range(n - 1, k - 1, -1):
        chances[rank - 1] = chances[rank] * (rank - k + 1) / rank
    _, group = np.unique(scores[order], return_inverse=True)
    shared = np.bincount(group, chances) / np.bincount(group)
    return float(shared[group] @ values[order])


def maj_at_k(answers: Answers, correct: Collection[Hashable], k: int) -> float:
    """The chance that a plurality vote of k of n samples gives a correct answer.

    Ties are broken at random, in expectation; a subset without any answer gives none. Counting
    the subsets answer by answer takes time polynomial in n, so nothing is drawn; where
    `exact_is_feasible` says no (many hundreds of samples), use `maj_at_k_drawn`.

    Args:
      answers: [n], normalised.
      correct: the answers that are right.
      k: number of voters.
    """
    _check_k(k, len(answers))
    counts = Counter(answer for answer in answers if answer is not None)
    abstaining = sum(answer is None for answer in answers)
    total = 0.0
    # Right answers that came equally often have the same chance.
    winners = Counter(counts[answer] for answer in set(correct) & counts.keys())
    for given, num_winners in winners.items():
        others = sorted(counts.values())
        others.remove(given)
        for votes in range(1, min(k, given) + 1):
            ways_TV = _ways(others, abstaining, votes, k - votes)
            shares = 1 / np.arange(1, len(ways_TV) + 1)
            total += num_winners * math.comb(given, votes) * float(shares @ ways_TV[:, -1])
    return total / math.comb(len(answers), k)


def maj_at_k_drawn(
    answers: Answers, correct: Collection[Hashable], k: int, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """`maj_at_k` from `draws` random k-subsets: the estimate and its standard error.

    For counts that are too large to be exact; ties still in expectation.
    """
    _check_k(k, len(answers))
    if draws < 1000:
        raise ValueError(f"{draws} draws are too few: take at least 1,000")
    rng, right = np.random.default_rng(seed), set(correct)
    shares = np.zeros(draws)
    for draw in range(draws):
        chosen = rng.choice(len(answers), k, replace=False)
        counts = Counter(answers[i] for i in chosen if answers[i] is not None)
        most = max(counts.values(), default=0)
        best = [answer for answer, num in counts.items() if num == most]
        shares[draw] = sum(answer in right for answer in best) / len(best) if best else 0.0
    return float(shares.mean()), float(shares.std(ddof=1) / math.sqrt(draws))


def exact_is_feasible(num_samples: int, k: int) -> bool:
    """Whether `maj_at_k` counts subsets in reasonable time, with numbers that floats hold."""
    return num_samples <= 300 or (num_samples <= 1000 and k <= 32)


def _ways(others: Sequence[int], abstaining: int, most: int, left: int) -> np.ndarray:
    """Ways to give `left` votes to other answers, none of which gets more than `most`.

    Returns [ties + 1, left + 1]: by how many of them got exactly `most`, and by votes given.
    """
    ways_TV = np.zeros((left // most + 1, left + 1))
    # Those who cannot reach `most` may vote as they like, like those who abstain: one binomial.
    free = abstaining + sum(num for num in others if num < most)
    ways_TV[0] = [math.comb(free, votes) for votes in range(left + 1)]
    for num in (num for num in others if num >= most):
        grown = ways_TV.copy()  # with no vote of theirs
        for votes in range(1, min(most - 1, left) + 1):
            grown[:, votes:] += math.comb(num, votes) * ways_TV[:, : left + 1 - votes]
        if left >= most:
            grown[1:, most:] += math.comb(num, most) * ways_TV[:-1, : left + 1 - most]
        ways_TV = grown
    return ways_TV


def oracle_at_k(answers: Answers, correct: Collection[Hashable], k: int) -> float:
    """1 if a correct answer is among the k most frequent ones: the oracle over final answers.

    The upper limit for Pass@k of any decoder that sees only the marginal of answers. Answers of
    equal frequency share the last places at random, in expectation.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    counts = Counter(answer for answer in answers if answer is not None)
    known = [counts[answer] for answer in set(correct) if answer in counts]
    if not known:
        return 0.0
    best = max(known)
    above = sum(num > best for num in counts.values())
    equal = sum(num == best for num in counts.values())
    places = min(max(k - above, 0), equal)
    right = sum(num == best for num in known)
    return 1 - math.comb(equal - right, places) / math.comb(equal, places)


def unique_share(answers: Answers) -> float:
    """Number of different answers over the number of samples that gave one; 0 if none did."""
    given = [answer for answer in answers if answer is not None]
    return len(set(given)) / len(given) if given else 0.0


def answer_entropy(answers: Answers) -> float:
    """Entropy of the answers' shares, in nats (plug-in estimate: too low for few samples)."""
    counts = np.array(list(Counter(a for a in answers if a is not None).values()), np.float64)
    shares = counts / max(counts.sum(), 1.0)
    return float(-(shares * np.log(shares)).sum()) if len(shares) else 0.0


@dataclasses.dataclass(frozen=True)
class Spread:
    """Bias and variance of Pass@1 over problems (arXiv 2504.10478).

    Attributes:
      bias: 1 - E[p].
      variance: Var(p) over problems, freed of the noise of n samples; may be below 0 by chance.
      plug_in: Var of the estimates themselves, too high by E[p (1 - p)] / n.
    """

    bias: float
    variance: float
    plug_in: float


def spread(num_samples: int, num_correct: ArrayLike) -> Spread:
    """Bias and variance of Pass@1 from c_i correct of n samples per problem.

    Var(p) = Var(p_hat) - mean(p_hat (1 - p_hat)) / (n - 1), Var(p_hat) with divisor (problems - 1):
    unbiased over problems drawn from a population and samples drawn for each.
    """
    c = np.asarray(num_correct, np.float64)
    if num_samples < 2 or c.ndim != 1 or len(c) < 2:
        raise ValueError(f"at least 2 samples of 2 problems: {num_samples} of {c.size} were given")
    if ((c < 0) | (c > num_samples)).any():
        raise ValueError(f"num_correct must lie between 0 and {num_samples}")
    p = c / num_samples
    plug_in = float(p.var(ddof=1))
    noise = float((p * (1 - p)).mean()) / (num_samples - 1)
    return Spread(1 - float(p.mean()), plug_in - noise, plug_in)


def pass_at_k_bound(bias: float, variance: float, k: int) -> float:
    """1 - (bias^2 + variance)^(k/2), no smaller than E[Pass@k] of a population, for k >= 2.

    Jensen: E[(1 - p)^k] >= E[(1 - p)^2]^(k/2), since x^(k/2) is convex; equal at k = 2. At k = 1 it
    is concave and the bound would be one from below: ValueError. It speaks of population moments:
    an estimate of Pass@k may pass one made of estimates.
    """
    if k < 2:
        raise ValueError(f"k is {k}: the bound holds for k >= 2, and is reversed at 1")
    return 1 - max(bias * bias + variance, 0.0) ** (k / 2)


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, but there are {n} samples: choose 1 <= k <= {n}")
