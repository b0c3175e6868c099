"""From records to Pass@k, Maj@k and Best@k with intervals, and the paired difference of models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moejax.core.errors import InputError
from moejax.evals import at_k, bootstrap, pass_at_k
from moejax.evals.bootstrap import Interval

Record = dict[str, Any]
UNSCORED = "unscored"


def counts(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Returns the tasks' ids in order, and per task the number of samples and of passes.

    Samples that could not be graded on this machine count neither way.
    """
    scored = [record for record in records if record["verdict"] != UNSCORED]
    samples = Counter(record["id"] for record in scored)
    passes = Counter(record["id"] for record in scored if record["passed"])
    ids = list(samples)
    return ids, np.array([samples[i] for i in ids]), np.array([passes[i] for i in ids])


def pass_at_1(records: Sequence[Mapping[str, Any]]) -> Interval:
    """The share of tasks passed: Wilson's interval, or the bootstrap over tasks of c / n."""
    _, num_samples, num_passed = counts(records)
    if (num_samples == 1).all():
        return bootstrap.wilson(int(num_passed.sum()), len(num_passed))
    return bootstrap.mean(num_passed / num_samples)


def check_ks(samples_per_task: Mapping[str, int], ks: Sequence[int]) -> None:
    """Raises InputError for a k that is larger than the number of samples of some task."""
    fewest = min(samples_per_task, key=lambda task: samples_per_task[task])
    if max(ks, default=1) > samples_per_task[fewest]:
        raise InputError(
            f"k = {max(ks)} needs as many samples; {fewest!r} has {samples_per_task[fewest]}"
        )


def summary(records: Sequence[Mapping[str, Any]], ks: Sequence[int] = (1,)) -> dict[str, Any]:
    """Pass@1 with its interval, Pass@k for `ks`, how often each verdict came up, and votes.

    Where answers are votes (records with "answer"), Maj@k and the share of different answers;
    where samples carry a "score", Best@k by it; bias and variance of Pass@1 where every task has
    the same number of samples, two or more.

    Raises:
      InputError: a k larger than the number of samples of some task.
    """
    ids, num_samples, num_passed = counts(records)
    verdicts = dict(Counter(record["verdict"] for record in records))
    result = {"num_answers": len(records), "verdicts": verdicts}
    result["num_weak"] = sum(bool(record.get("weak")) for record in records)
    if not ids:
        return result | {"pass_at_1": None, "pass_at_1_interval": None, "pass_at_1_n": 0}
    check_ks(dict(zip(ids, num_samples.tolist(), strict=True)), ks)
    interval = pass_at_1(records)
    per_k = {str(k): pass_at_k.estimate(num_samples, num_passed, k) for k in ks}
    result |= {
        "pass_at_1": interval.mean,
        "pass_at_1_interval": [interval.low, interval.high],
        "pass_at_1_n": len(ids),
        "pass_at_k": {k: float(values.mean()) for k, values in per_k.items()},
        "pass_at_k_interval": {k: _bounds(values) for k, values in per_k.items()},
    }
    if (num_samples == num_samples[0]).all() and num_samples[0] > 1 and len(ids) > 1:
        spread = at_k.spread(int(num_samples[0]), num_passed)
        result["bias_of_pass_at_1"] = spread.bias
        result["variance_of_pass_at_1"] = spread.variance
    return result | _chosen(records, ids, num_samples, ks)


def _bounds(values: np.ndarray) -> list[float]:
    interval = bootstrap.mean(values)
    return [interval.low, interval.high]


def _chosen(
    records, ids: Sequence[str], num_samples: np.ndarray, ks: Sequence[int]
) -> dict[str, Any]:
    """What a vote or a score makes of k samples, where the records have votes or scores."""
    by_id: dict[str, list] = {name: [] for name in ids}
    for record in records:
        if record["verdict"] != UNSCORED:
            by_id[record["id"]].append(record)
    result: dict[str, Any] = {}
    if any(record.get("answer") is not None for record in records):
        maj = {k: [_maj(group, k) for group in by_id.values()] for k in ks}
        result["maj_at_k"] = {str(k): float(np.mean(values)) for k, values in maj.items()}
        drawn = [k for k in ks if not at_k.exact_is_feasible(int(num_samples.max()), k)]
        if drawn:
            result["maj_at_k_standard_error"] = {str(k): _drawn_error(by_id, k) for k in drawn}
        result["maj_at_k_interval"] = {str(k): _bounds(np.array(v)) for k, v in maj.items()}
        answers = [[record.get("answer") for record in group] for group in by_id.values()]
        result["unique_answers"] = float(np.mean([at_k.unique_share(group) for group in answers]))
        result["answer_entropy"] = float(np.mean([at_k.answer_entropy(g) for g in answers]))
    if all(isinstance(record.get("score"), (int, float)) for record in records):
        best = {str(k): float(np.mean([_best(group, k) for group in by_id.values()])) for k in ks}
        result["best_at_k"] = best
    return result


def _maj(group: Sequence[Mapping[str, Any]], k: int) -> float:
    answers = [record.get("answer") for record in group]
    correct = {record.get("answer") for record in group if record["passed"]} - {None}
    if at_k.exact_is_feasible(len(answers), k):
        return at_k.maj_at_k(answers, correct, k)
    return at_k.maj_at_k_drawn(answers, correct, k)[0]


def _drawn_error(by_id: Mapping[str, list], k: int) -> float:
    """Standard error, from the draws alone, of the mean over tasks of a drawn Maj@k."""
    errors = []
    for group in by_id.values():
        answers = [record.get("answer") for record in group]
        correct = {record.get("answer") for record in group if record["passed"]} - {None}
        if not at_k.exact_is_feasible(len(answers), k):
            errors.append(at_k.maj_at_k_drawn(answers, correct, k)[1])
    return float(np.sqrt(np.sum(np.square(errors))) / len(by_id))


def _best(group: Sequence[Mapping[str, Any]], k: int) -> float:
    scores = [record["score"] for record in group]
    return at_k.best_at_k(scores, [float(record["passed"]) for record in group], k)


def minus(records_a: Sequence[Record], records_b: Sequence[Record]) -> Interval:
    """The paired difference in Pass@1 of two models on the same tasks.

    Raises:
      ValueError: the tasks differ.
    """
    (ids_a, n_a, c_a), (ids_b, n_b, c_b) = counts(records_a), counts(records_b)
    if sorted(ids_a) != sorted(ids_b):
        raise ValueError(f"{len(ids_a)} and {len(ids_b)} tasks, which are not the same")
    order = [ids_b.index(name) for name in ids_a]
    n_b, c_b = n_b[order], c_b[order]
    if (n_a == 1).all() and (n_b == 1).all():
        return bootstrap.paired_share(c_a == 1, c_b == 1)
    return bootstrap.paired_mean(c_a / n_a, c_b / n_b)


def compare(records_a: Sequence[Record], records_b: Sequence[Record]) -> dict[str, Any]:
    """The paired difference in Pass@1 (a minus b), its interval, and tests that there is none.

    "p_sign": McNemar's exact test, for one sample a task; "p_flip": Fisher's randomisation test on
    the tasks' shares.

    Raises:
      ValueError: the tasks differ.
    """
    interval = minus(records_a, records_b)
    (ids_a, n_a, c_a), (ids_b, n_b, c_b) = counts(records_a), counts(records_b)
    order = [ids_b.index(name) for name in ids_a]
    n_b, c_b = n_b[order], c_b[order]
    single = bool((n_a == 1).all() and (n_b == 1).all())
    return {
        "difference": interval.mean,
        "interval": [interval.low, interval.high],
        "verdict": bootstrap.verdict(interval),
        "p_sign": bootstrap.sign_test(c_a == 1, c_b == 1) if single else None,
        "p_flip": bootstrap.flip_test(c_a / n_a, c_b / n_b),
        "num_tasks": len(ids_a),
    }


def choose_form(results: Mapping[str, Sequence[Record]]) -> str:
    """Returns the prompt form with the most passes; of equals the first.

    Chosen on the base model and then used for every row, it can only favour the base.
    """
    if not results:
        raise ValueError("no results to choose a form from")
    return max(results, key=lambda form: sum(record["passed"] for record in results[form]))
