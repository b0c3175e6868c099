"""From relevance scores to a task's experts (ESFT, arXiv 2407.01906, section 3.3).

Each layer by itself: experts by descending score, the lower id first on ties, as many as it takes
for their scores to reach the threshold p (eq. 9). The paper has p = 0.2 for the token selection
ratio and 0.1 for the average gate score, which does not sum to one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from moejax.core.errors import InputError
from moejax.methods.expert_config import ExpertConfig

SCORES = ("token", "gate", "gradient")


@dataclasses.dataclass(frozen=True)
class ExpertScores:
    """How relevant each expert of a model is to a task.

    layers: numbers of the layers, counted over the whole model, in the order they were given.
    experts: ids of the scored experts. values: score name -> float64 [layers, experts].
    """

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    values: Mapping[str, np.ndarray]

    def named(self, name: str) -> np.ndarray:
        """One score; InputError lists those there are."""
        if name not in self.values:
            raise InputError(
                f"no {name} scores there, only {', '.join(self.values)}: choose one of these"
            )
        return self.values[name]

    def rounded(self, decimals: int | None) -> ExpertScores:
        """Scores rounded as the reference's published ones are; None leaves them."""
        if decimals is None:
            return self
        round_all = np.vectorize(lambda v: round(float(v), decimals), otypes=[np.float64])
        values = {name: round_all(value) for name, value in self.values.items()}
        return dataclasses.replace(self, values=values)


def check_threshold(threshold: float) -> None:
    """Raises InputError outside (0, 1]."""
    if not 0 < threshold <= 1:  # NaN too
        raise InputError(f"threshold {threshold} lies outside (0, 1]: the paper has 0.2 and 0.1")


def select_by_threshold(scores: ExpertScores, name: str, threshold: float) -> ExpertConfig:
    """Per layer the smallest prefix, by descending score, whose sum reaches the threshold.

    All experts of a layer whose scores never reach it.
    """
    check_threshold(threshold)

    def size(ranked: np.ndarray) -> int:
        total, count = 0.0, 0  # summed as the reference does, term by term in float64
        while count < len(ranked) and total < threshold:
            total += float(ranked[count])
            count += 1
        return count

    return _select(scores, name, lambda layer, ranked: size(ranked))


def select_by_count(
    scores: ExpertScores, name: str, counts: int | Mapping[int, int]
) -> ExpertConfig:
    """Per layer the `counts` best experts: one number, or a number for each layer."""

    def size(layer: int, ranked: np.ndarray) -> int:
        count = counts if isinstance(counts, int) else counts.get(layer, 0)
        if not 0 <= count <= len(ranked):
            raise InputError(f"{count} experts of layer {layer}, which has {len(ranked)}: ask less")
        return count

    return _select(scores, name, size)


def select_by_bytes(
    scores: ExpertScores, name: str, num_bytes: int, expert_bytes: int, threshold: float = 1.0
) -> ExpertConfig:
    """The experts under the largest common threshold, at most `threshold`, that fit in num_bytes.

    The layer whose chosen scores sum to least gets the next expert, the lower layer first on ties.
    """
    check_threshold(threshold)
    values, order = scores.named(name), _order(scores.named(name))
    totals = [0.0] * len(values)
    taken = [0] * len(values)
    num_layers, num_experts = values.shape
    for _ in range(num_bytes // expert_bytes):
        open_layers = [
            i for i in range(num_layers) if taken[i] < num_experts and totals[i] < threshold
        ]
        if not open_layers:
            break
        i = min(open_layers, key=lambda i: (totals[i], scores.layers[i]))
        totals[i] += float(values[i, order[i, taken[i]]])
        taken[i] += 1
    if not any(taken):
        raise InputError(
            f"a budget of {num_bytes} bytes holds no expert of {expert_bytes}: raise it"
        )
    sizes = dict(zip(scores.layers, taken, strict=True))
    return _select(scores, name, lambda layer, _: sizes[layer])


def select_random(scores: ExpertScores, counts: Mapping[int, int], seed: int) -> ExpertConfig:
    """The control: as many experts of each layer, drawn without regard to scores.

    A layer's draw depends on (seed, layer) alone.
    """
    experts = {}
    for layer in scores.layers:
        draw = np.random.default_rng([seed, layer])
        size = counts.get(layer, 0)
        chosen = draw.choice(len(scores.experts), size, replace=False)
        experts[layer] = tuple(scores.experts[i] for i in chosen)
    return ExpertConfig(experts)


def counts_of(config: ExpertConfig) -> dict[int, int]:
    """How many experts each layer has."""
    return {layer: len(ids) for layer, ids in config.experts.items()}


def mass_of(scores: ExpertScores, name: str, config: ExpertConfig) -> dict[int, float]:
    """Per layer the sum of the chosen experts' scores."""
    values = scores.named(name)
    column = {e: i for i, e in enumerate(scores.experts)}
    return {
        layer: math.fsum(values[i, column[e]] for e in config.experts.get(layer, ()))
        for i, layer in enumerate(scores.layers)
    }


def _order(values: np.ndarray) -> np.ndarray:
    """Columns by descending score, the lower first on ties."""
    return np.argsort(-values, axis=1, kind="stable")


def _select(
    scores: ExpertScores, name: str, size: Callable[[int, np.ndarray], int]
) -> ExpertConfig:
    values, order = scores.named(name), _order(scores.named(name))
    experts = {}
    for i, layer in enumerate(scores.layers):
        chosen = order[i, : size(layer, values[i, order[i]])]
        experts[layer] = tuple(scores.experts[j] for j in chosen)
    return ExpertConfig(experts)
