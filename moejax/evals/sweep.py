"""A sweep over interpolations and decodings of one run: every arm sampled, graded and measured.

An arm is an early checkpoint, its share delta and a way to sample. The two ends are loaded once;
delta is an argument of the program that mixes them, so that all arms share one compiled decoder.
What was drawn lies in a file per arm and split: a sweep that was stopped goes on with what is
missing. Nothing here chooses on the split that it reports on.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.evals import bootstrap
from moejax.evals.bootstrap import Interval
from moejax.evals.sampled import Measure, Sampled, maj_values, measures, pass_values
from moejax.io import atomic
from moejax.methods.interpolate import mix
from moejax.serve.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is asked (token ids of the prompt) and what would be right (for the grader)."""

    id: str
    prompt: tuple[int, ...]
    gold: Any


@dataclasses.dataclass(frozen=True)
class Answer:
    """One sample, read by the grader: its normalised answer (None: there is none), and whether it
    is right. score: what Best@k chooses by."""

    text: str
    answer: str | None
    correct: bool
    score: float | None = None


# (parameters, problems, samples of each, sampling, seed) -> answers [problems][samples].
Draw = Callable[
    [tree.Tree, Sequence[Problem], int, SamplingConfig, int], Sequence[Sequence[Answer]]
]


@dataclasses.dataclass(frozen=True)
class Arm:
    """delta * early + (1 - delta) * late, decoded by `sampling`; early: name of the checkpoint."""

    early: str
    delta: float
    sampling: SamplingConfig

    @property
    def label(self) -> str:
        """Short and unique within a sweep."""
        who = "late" if self.delta == 0 else f"{self.early} {self.delta:g}"
        return f"{who}, {describe_sampling(self.sampling)}"


def describe_sampling(sampling: SamplingConfig) -> str:
    """T 0.7 top_p 0.9: what differs from plain sampling, the temperature always."""
    parts = [f"T {sampling.temperature:g}"]
    parts += [f"top_k {sampling.top_k}"] if sampling.top_k else []
    parts += [f"top_p {sampling.top_p:g}"] if sampling.top_p < 1 else []
    parts += [f"min_p {sampling.min_p:g}"] if sampling.min_p else []
    return " ".join(parts)


@functools.partial(jax.jit)
def mixed(early: tree.Tree, late: tree.Tree, delta: jax.Array) -> tree.Tree:
    """delta * early + (1 - delta) * late with a traced delta: one program for a whole sweep."""
    return jax.tree.map(lambda a, b: mix(a, b, delta), early, late)


class Sweep:
    """Draws arms as they are asked for, and remembers what it drew.

    Args:
      late: parameters. early: name -> function that loads the parameters of a checkpoint, called
        when an arm first asks for it (one early checkpoint is in memory at a time).
      draw: samples and grades.
      num_samples: of each problem. seed: of the draws; the same for every arm.
      folder: where samples are kept.
    """

    def __init__(
        self,
        late: tree.Tree,
        early: Mapping[str, Callable[[], tree.Tree]],
        draw: Draw,
        num_samples: int,
        folder: Path,
        *,
        seed: int = 0,
        progress: Callable[[str], None] = lambda line: None,
    ):
        self._late, self._early, self._draw = late, early, draw
        self._num_samples, self._folder, self._seed = num_samples, folder, seed
        self._progress = progress
        self._loaded: tuple[str, tree.Tree] | None = None

    def sampled(self, arm: Arm, split: str, problems: Sequence[Problem]) -> Sampled:
        """The arm's answers to the problems of a split, drawn now or before."""
        digest = hashlib.sha256(f"{arm.label}|{split}".encode()).hexdigest()[:12]
        path = self._folder / f"{split}_{digest}.jsonl"
        if path.is_file():
            return _read(path, problems, self._num_samples)
        params = self._params(arm)
        self._progress(f"{split}: {arm.label}, {len(problems)} x {self._num_samples}")
        rows = self._draw(params, problems, self._num_samples, arm.sampling, self._seed)
        lines = []
        for problem, answers in zip(problems, rows, strict=True):
            record: dict[str, Any] = {"id": problem.id, "arm": arm.label, "split": split}
            record["samples"] = [dataclasses.asdict(answer) for answer in answers]
            lines.append(json.dumps(record) + "\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, "".join(lines))
        return _read(path, problems, self._num_samples)

    def _params(self, arm: Arm) -> tree.Tree:
        if arm.delta == 0:
            return self._late
        if self._loaded is None or self._loaded[0] != arm.early:
            self._loaded = None  # frees the one before
            self._loaded = arm.early, self._early[arm.early]()
        return mixed(self._loaded[1], self._late, jnp.float32(arm.delta))


def _read(path: Path, problems: Sequence[Problem], num_samples: int) -> Sampled:
    records = {}
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        records[record["id"]] = record["samples"]
    lacking = [p.id for p in problems if len(records.get(p.id, ())) != num_samples]
    if lacking:
        raise InputError(
            f"{path} was drawn for other problems or another number of samples ({lacking[0]!r} has "
            f"{len(records.get(lacking[0], ()))} of {num_samples}): give another folder"
        )
    rows = [records[p.id] for p in problems]
    scores = np.array([[np.nan if s["score"] is None else s["score"] for s in r] for r in rows])
    return Sampled(
        ids=tuple(p.id for p in problems),
        answers=tuple(tuple(s["answer"] for s in row) for row in rows),
        correct=np.array([[s["correct"] for s in row] for row in rows]),
        scores=None if np.isnan(scores).any() else scores,
        score_name="mean log-probability",
    )


# -- choosing --------------------------------------------------------------------------------------

CRITERIA = ("pass", "maj")


@dataclasses.dataclass(frozen=True)
class Criterion:
    """What is made as large as possible on the validation problems: "pass@8", "maj@16"."""

    name: str
    k: int

    @classmethod
    def parse(cls, text: str) -> Criterion:
        """InputError for anything but pass@K and maj@K."""
        name, at, k = text.partition("@")
        if name not in CRITERIA or not at or not k.isdigit() or int(k) < 1:
            raise InputError(f"criterion {text!r} is unknown: use pass@K or maj@K")
        return cls(name, int(k))

    def values(self, sampled: Sampled) -> np.ndarray:
        """Per problem [P]."""
        return (pass_values if self.name == "pass" else maj_values)(sampled, self.k)


def next_delta(scores: Mapping[float, float]) -> float:
    """Where to look next for the largest score: the middle of the wider gap beside the best delta.

    scores: {delta: score}, both ends among them. Of equal scores the smaller delta counts as best.
    """
    deltas = sorted(scores)
    best = max(deltas, key=lambda d: (scores[d], -d))
    at = deltas.index(best)
    gaps = [(deltas[i], deltas[i + 1]) for i in (at - 1, at) if 0 <= i < len(deltas) - 1]
    low, high = max(gaps, key=lambda gap: gap[1] - gap[0])
    return (low + high) / 2


def search(score: Callable[[float], float], num_points: int) -> dict[float, float]:
    """{delta: score} of a search from both ends and the middle on, `num_points` in all."""
    if num_points < 3:
        raise InputError(f"a search needs at least 3 points, got {num_points}")
    scores = {delta: score(delta) for delta in (0.0, 1.0, 0.5)}
    while len(scores) < num_points:
        delta = next_delta(scores)
        scores[delta] = score(delta)
    return scores


# -- reporting -------------------------------------------------------------------------------------


def rows_of(arm: Arm, split: str, sampled: Sampled, ks: Sequence[int]) -> list[dict[str, Any]]:
    """The arm's measures as rows of the sweep's table."""
    head = {"split": split, "arm": arm.label, "early": arm.early, "delta": arm.delta}
    head["sampling"] = describe_sampling(arm.sampling)
    found: list[Measure] = measures(sampled, ks)
    return [head | measure.record() for measure in found]


def differences(
    first: Sampled, second: Sampled, ks: Sequence[int], *, seed: int = 0
) -> list[dict[str, Any]]:
    """first - second at every k, paired by problem: Pass@k and Maj@k with 95% intervals and p."""
    rows = []
    for k in ks:
        for name, of in (("pass", pass_values), ("maj", maj_values)):
            a, b = of(first, k), of(second, k)
            gap: Interval = bootstrap.paired_mean(a, b, seed=seed)
            row = {"measure": name, "k": k, "value": gap.mean, "low": gap.low, "high": gap.high}
            row["p"] = bootstrap.flip_test(a, b, seed=seed)
            row["verdict"] = bootstrap.verdict(gap)
            rows.append(row)
    return rows
