"""Graded samples of many problems, and everything that is said of them, with intervals.

One table for a sweep: Pass@k, Maj@k, Best@k and the answer oracle at each k, how different a
problem's answers are, and bias and variance of Pass@1 over problems with the bound they give
(arXiv 2504.10478). Problems are the unit of every interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from moejax.evals import at_k, bootstrap, pass_at_k
from moejax.evals.bootstrap import Interval


@dataclasses.dataclass(frozen=True)
class Sampled:
    """n samples of each of P problems.

    Attributes:
      ids: [P], of the problems, each once.
      answers: [P][n], normalised; None where a sample gave none.
      correct: bool [P, n].
      scores: float [P, n] of what Best@k chooses by, or None.
      score_name: what that is, as it is reported.
    """

    ids: tuple[str, ...]
    answers: tuple[tuple[Hashable | None, ...], ...]
    correct: np.ndarray
    scores: np.ndarray | None = None
    score_name: str = ""

    def __post_init__(self):
        shape = (len(self.ids), self.num_samples)
        lengths = {len(row) for row in self.answers}
        if len(self.answers) != len(self.ids) or lengths - {self.num_samples}:
            raise ValueError(f"answers of {len(self.answers)} problems for correct{shape}")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("a problem is there twice")
        if self.correct.shape != shape:
            raise ValueError(f"correct is {self.correct.shape}, the answers are {shape}")
        if self.scores is not None and self.scores.shape != shape:
            raise ValueError(f"scores are {self.scores.shape}, the answers are {shape}")

    @property
    def num_samples(self) -> int:
        """n, the samples of each problem."""
        return self.correct.shape[1]

    def take(self, problems: Sequence[int]) -> Sampled:
        """The same of some problems, by number."""
        scores = None if self.scores is None else self.scores[list(problems)]
        return dataclasses.replace(
            self,
            ids=tuple(self.ids[p] for p in problems),
            answers=tuple(self.answers[p] for p in problems),
            correct=self.correct[list(problems)],
            scores=scores,
        )


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number of a table: its name, its k (0 where it has none), value and 95% interval.

    A value without an interval (the bound, which is no mean) has itself as both ends.
    """

    name: str
    k: int
    value: Interval

    def record(self) -> dict[str, float | str | int]:
        """As a row of a table."""
        return {
            "measure": self.name,
            "k": self.k,
            "value": self.value.mean,
            "low": self.value.low,
            "high": self.value.high,
        }


def pass_values(sampled: Sampled, k: int) -> np.ndarray:
    """Pass@k of every problem [P], unbiased."""
    return pass_at_k.estimate(sampled.num_samples, sampled.correct.sum(1), k)


def maj_values(sampled: Sampled, k: int) -> np.ndarray:
    """Maj@k of every problem [P]: a vote's chance to be right, exactly."""
    return _each(sampled, lambda answers, right: at_k.maj_at_k(answers, right, k))


def measures(sampled: Sampled, ks: Sequence[int], *, seed: int = 0) -> list[Measure]:
    """All that is said of a set of samples; ks: each between 1 and n.

    pass@k, maj@k, best@k (where there are scores), oracle@k; unique (different answers over
    answers), entropy (of the answers' shares, nats), answered (samples with an answer); bias,
    variance (noise of n samples taken out), bound@k (k >= 2).
    """
    n = sampled.num_samples
    for k in ks:
        if not 1 <= k <= n:
            raise ValueError(f"k is {k}, but there are {n} samples: choose 1 <= k <= {n}")
    rows: list[Measure] = []
    for k in ks:
        columns: dict[str, np.ndarray] = {
            "pass": pass_values(sampled, k),
            "maj": maj_values(sampled, k),
            "oracle": _each(sampled, lambda a, right, k=k: at_k.oracle_at_k(a, right, k)),
        }
        if sampled.scores is not None:
            pairs = zip(sampled.scores, sampled.correct, strict=True)
            columns["best"] = np.array([at_k.best_at_k(s, c, k) for s, c in pairs])
        rows += [Measure(name, k, bootstrap.mean(v, seed=seed)) for name, v in columns.items()]
    for name, of in (("unique", at_k.unique_share), ("entropy", at_k.answer_entropy)):
        values = np.array([of(answers) for answers in sampled.answers])
        rows.append(Measure(name, 0, bootstrap.mean(values, seed=seed)))
    given = [np.mean([a is not None for a in answers]) for answers in sampled.answers]
    rows.append(Measure("answered", 0, bootstrap.mean(given, seed=seed)))
    return rows + _spread(sampled, ks, seed)


def _each(sampled: Sampled, of: Callable[..., float]) -> np.ndarray:
    """of(answers, the right ones among them) for every problem."""
    values = []
    for answers, correct in zip(sampled.answers, sampled.correct, strict=True):
        right = {a for a, ok in zip(answers, correct, strict=True) if ok and a is not None}
        values.append(of(answers, right))
    return np.array(values, np.float64)


def _spread(sampled: Sampled, ks: Sequence[int], seed: int) -> list[Measure]:
    """Bias, variance and bound; none of them where there is one sample or one problem."""
    num_problems, n = sampled.correct.shape
    if n < 2 or num_problems < 2:
        return []
    p = sampled.correct.mean(1)
    found = at_k.spread(n, sampled.correct.sum(1))

    def variance(means: np.ndarray) -> np.ndarray:
        plug_in = (means[:, 1] - means[:, 0] ** 2) * num_problems / (num_problems - 1)
        return plug_in - means[:, 2] / (n - 1)

    moments = np.stack([p, p * p, p * (1 - p)], axis=1)
    low, high = bootstrap.of_means(moments, variance, seed=seed)
    interval = Interval(found.variance, min(low, found.variance), max(high, found.variance))
    rows = [
        Measure("bias", 0, bootstrap.mean(1 - p, seed=seed)),
        Measure("variance", 0, interval),
    ]
    for k in ks:
        if k >= 2:
            bound = at_k.pass_at_k_bound(found.bias, max(found.variance, 0.0), k)
            rows.append(Measure("bound", k, Interval(bound, bound, bound)))
    return rows
