"""WiSE-FT: an early and a late checkpoint of one run, mixed weight by weight (arXiv 2504.10478).

    w = delta * early + (1 - delta) * late

delta is the share of the EARLY checkpoint: 0 is the late model, 1 the early one. The method of
2021 (arXiv 2109.01903) has its coefficient on the fine-tuned model and so runs the other way.
Arithmetic is float32 (float64 for float64 weights), cast back; where delta is 0 or 1 the bits of
that end are kept. Mixing is sound within one run only: experts and neurons then still correspond.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.config import ModelConfig

# Leaves below it are stacks: of layers, and in an MoE layer also of experts.
_STACK = "layers/"


@dataclasses.dataclass(frozen=True)
class Deltas:
    """The early checkpoint's share, everywhere or by place; the first rule that speaks wins.

    Attributes:
      delta: where no other rule speaks.
      patterns: (pattern, delta) pairs over paths of the tree, "**/attn/**"; the first that fits. A
        pattern with delta 0 keeps the late model there.
      experts: by number of the expert, for the experts' own weights; empty: none.
      layers: anchors spread evenly from the first layer to the last, linear between; empty: none.
      extrapolate: allow deltas outside [0, 1].

    Errors: InputError for a delta that is not finite, or outside [0, 1] without `extrapolate`.
    """

    delta: float = 0.5
    patterns: tuple[tuple[str, float], ...] = ()
    experts: tuple[float, ...] = ()
    layers: tuple[float, ...] = ()
    extrapolate: bool = False

    def __post_init__(self):
        named = [("delta", self.delta), *((f"delta of {p}", d) for p, d in self.patterns)]
        named += [(f"delta of expert {i}", d) for i, d in enumerate(self.experts)]
        named += [(f"delta {i} of the layers", d) for i, d in enumerate(self.layers)]
        for name, value in named:
            if not math.isfinite(value):
                raise InputError(f"{name} is {value}: give a number from 0 (late) to 1 (early)")
            if not self.extrapolate and not 0 <= value <= 1:
                raise InputError(
                    f"{name} is {value}, outside [0, 1]: 0 is the late model, 1 the early one; "
                    "pass --allow_extrapolation if it is meant"
                )

    def of(self, path: str, layer: int | None, expert: int | None, num_layers: int) -> float:
        """The delta of one tensor; layer: counted over the whole model, None outside the layers."""
        for pattern, delta in self.patterns:
            if tree.matches(path, pattern):
                return delta
        if self.experts and expert is not None:
            return self.experts[expert]
        if self.layers and layer is not None:
            place = layer / max(1, num_layers - 1) * (len(self.layers) - 1)
            return float(np.interp(place, range(len(self.layers)), self.layers))
        return self.delta

    def check_fits(self, config: ModelConfig, paths: Sequence[str]) -> None:
        """Raises InputError for a rule that speaks of nothing in this model."""
        for pattern, _ in self.patterns:
            if not any(tree.matches(path, pattern) for path in paths):
                raise InputError(
                    f"pattern {pattern!r} fits no path of this model; paths are like "
                    f"{paths[len(paths) // 2]}"
                )
        num_experts = config.moe.num_experts if config.moe else 0
        if self.experts and len(self.experts) != num_experts:
            raise InputError(
                f"{len(self.experts)} deltas of experts, but the model has {num_experts} experts"
            )


def interpolate(
    early: tree.Tree, late: tree.Tree, config: ModelConfig, deltas: Deltas = Deltas()
) -> tree.Tree:
    """delta * early + (1 - delta) * late for every leaf; both trees stay as they are.

    Works on host arrays and on sharded ones (each device mixes its own slices).
    Errors: InputError where paths, shapes or dtypes differ.
    """
    check_same_tree(early, late)
    flat, other = tree.flatten(late), tree.flatten(early)
    deltas.check_fits(config, list(flat))
    mixed = {
        path: mix(other[path], leaf, _stacked(deltas, path, leaf, config))
        for path, leaf in flat.items()
    }
    return tree.unflatten(mixed)


def mix(early: Any, late: Any, delta: Any) -> Any:
    """delta * early + (1 - delta) * late in float32, cast back; the end's bits at 0 and 1.

    delta: a number, which may be traced (one compiled program then serves a sweep), or an array
    that is broadcast from the left: one delta per layer, or per layer and expert.
    """
    if isinstance(delta, (int, float)) and delta in (0, 1):
        return early if delta else late
    wide = jnp.promote_types(late.dtype, jnp.float32)
    delta = jnp.asarray(delta, wide)
    delta = delta.reshape(*delta.shape, *[1] * (late.ndim - delta.ndim))
    mixed = delta * early.astype(wide) + (1 - delta) * late.astype(wide)
    mixed = mixed.astype(late.dtype)
    return jnp.where(delta == 0, late, jnp.where(delta == 1, early, mixed))


def check_same_tree(first: tree.Tree, second: tree.Tree) -> None:
    """Raises InputError unless two trees have the same paths, shapes and dtypes."""
    found = tree.diff(tree.abstract(first), tree.abstract(second))
    if found:
        raise InputError(
            f"the two models differ in {len(found)} parameters, so they cannot be mixed: {found[0]}"
        )


def _stacked(deltas: Deltas, path: str, leaf: Any, config: ModelConfig) -> Any:
    """One number, or an array over the leaf's leading dims, if they differ there."""
    indices = list(stack_indices(path, leaf.shape))
    values = [
        deltas.of(path, layer_number(path, index, config), _expert(index), config.num_layers)
        for index in indices
    ]
    if len(set(values)) == 1:
        return values[0]
    leading = [1 + last for last in indices[-1]]
    return np.asarray(values, np.float32).reshape(leading)


def stack_indices(path: str, shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The indices of a leaf's own tensors: (), (layer,) or (layer, expert)."""
    num_dims = 2 if "/moe/experts/" in path else 1
    return np.ndindex(*shape[: num_dims if path.startswith(_STACK) else 0])


def layer_number(path: str, index: Sequence[int], config: ModelConfig) -> int | None:
    """The number in the whole model of a layer of a run of equal ones; None outside the layers."""
    if not path.startswith(_STACK):
        return None
    number = int(path.split("/")[1])
    return sum(run.num_layers for run in config.runs[:number]) + index[0]


def _expert(index: Sequence[int]) -> int | None:
    return index[1] if len(index) > 1 else None


def ema_weights(num: int, decay: float) -> tuple[float, ...]:
    """Weights of checkpoints 1..n, oldest first, in their exponential moving average.

    e_1 = c_1, e_i = decay e_(i-1) + (1 - decay) c_i: the average that a run would have kept at
    these steps. They sum to one. InputError unless 0 <= decay < 1.
    """
    if not 0 <= decay < 1:
        raise InputError(f"decay must lie in [0, 1), got {decay}")
    newer = tuple((1 - decay) * decay ** (num - 1 - i) for i in range(1, num))
    return (decay ** (num - 1), *newer)


def greedy_soup(scores: Sequence[float], score_of_mean: Any) -> tuple[int, ...]:
    """The members of a greedy soup (arXiv 2203.05482, recipe 1): higher scores are better.

    Args:
      scores: of each model on validation data.
      score_of_mean: (numbers of models) -> score of their equal mean, on the same data.
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    members: tuple[int, ...] = (order[0],)
    best = scores[order[0]]
    for candidate in order[1:]:
        score = score_of_mean((*members, candidate))
        if score >= best:
            members, best = (*members, candidate), score
    return members


def lora_delta(early: tuple[Any, Any], late: tuple[Any, Any], delta: float) -> jax.Array:
    """delta * A_e B_e + (1 - delta) * A_l B_l: the change of a weight [D, F], interpolated.

    early, late: (A [D, r], B [r, F]) of a low-rank adapter. Mixing A and B on their own would give
    products of unlike halves, which is another function; ranks of the two ends may differ.
    """
    products = [a.astype(jnp.float32) @ b.astype(jnp.float32) for a, b in (early, late)]
    return delta * products[0] + (1 - delta) * products[1]
