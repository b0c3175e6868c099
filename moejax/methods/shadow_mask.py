"""Which heads and blocks of neurons are computed: scores to masks to lists of fixed length.

ShadowLLM (arXiv 2406.16635) prunes whole heads and neurons by a score. Here neurons come in blocks
of `Sizes.block`, so that what is computed is contiguous, and heads singly or as whole groups that
share keys and values.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.models.inserted import Inserted
from moejax.models.masked import check_alike, masking, one_neuron_shape

BUDGETS = ("local", "global", "hybrid")
HEAD_UNITS = ("query", "group")
# What "hybrid" leaves of every layer at least (the reference's numbers).
MIN_HEADS, MIN_NEURONS = 1, 256


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a mask of a model has.

    Attributes:
      num_layers: L. heads: units of heads in a layer, H of them ("query") or G ("group").
      blocks: blocks of neurons in a layer, of all its experts together. block: neurons in one.
      unit: "query" or "group". first: layers before this one are never pruned.
    """

    num_layers: int
    heads: int
    blocks: int
    block: int
    unit: str = "query"
    first: int = 1

    def kept(self, sparsity: tuple[float, float]) -> tuple[int, int]:
        """How many heads and blocks of a layer are kept."""
        return num_kept(self.heads, sparsity[0]), num_kept(self.blocks, sparsity[1])


def sizes_of(config: ModelConfig, block: int, unit: str = "query", first: int = 1) -> Sizes:
    """Sizes for a model; InputError where the block does not divide or a name is unknown."""
    if unit not in HEAD_UNITS:
        raise InputError(f"heads by {unit!r} are unknown: use {' or '.join(HEAD_UNITS)}")
    shape = one_neuron_shape(config)
    if block < 1 or shape[-1] % block:
        raise InputError(f"blocks of {block} neurons do not divide a layer's {shape[-1]}")
    if not 1 <= first < config.num_layers:
        raise InputError(
            f"{first} layers never pruned, of {config.num_layers}: the first one tells the "
            "predictor what is needed, so take 1 at least, and leave one to prune"
        )
    check_alike(config, first)
    heads = config.num_heads if unit == "query" else config.num_kv_heads
    return Sizes(config.num_layers, heads, math.prod(shape) // block, block, unit, first)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """One number per unit: a mask (bool) or scores (float), the larger the more important.

    heads: [..., L, H] or [..., L, G]. blocks: [..., L, blocks], of experts in their order.
    """

    heads: Any  # of jax or numpy
    blocks: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """The kept units of layers `Sizes.first` to L - 1, as sorted indices, equally many per layer.

    heads: int32 [..., L - first, Kh]. blocks: int32 [..., L - first, Kb]. Earlier layers are dense.
    """

    heads: jax.Array
    blocks: jax.Array


def check_sparsity(sparsity: float) -> float:
    """The sparsity; InputError unless it lies in [0, 1)."""
    if not 0 <= sparsity < 1:  # NaN too
        raise InputError(f"sparsity {sparsity:g} lies outside [0, 1): it is the share not computed")
    return float(sparsity)


def num_kept(num_units: int, sparsity: float) -> int:
    """How many of a layer's units are kept: all but floor(sparsity * units)."""
    # 0.7 * 10 is 6.999...: what rounding took away must not keep one more.
    return num_units - math.floor(check_sparsity(sparsity) * num_units + 1e-9)


def select(
    scores: Mask,
    sizes: Sizes,
    sparsity: float | tuple[float, float],
    budget: str = "local",
) -> Mask:
    """The mask that prunes the lowest scores.

    Args:
      scores: [..., L, units]; leading dims are examples, each with a mask of its own.
      sizes: layers before `sizes.first` keep everything and count in no budget.
      sparsity: share of units that is pruned, of heads and blocks alike or (heads, blocks).
      budget: "local" prunes floor(s * units) of each layer; "global" floor(s * all units) over all
        layers; "hybrid" does too but leaves each layer MIN_HEADS heads and MIN_NEURONS neurons.

    Of equal scores the earlier unit is kept. InputError: sparsity outside [0, 1), an unknown
    budget, scores that are NaN or of other sizes.
    """
    if budget not in BUDGETS:
        raise InputError(f"budget {budget!r} is unknown: use {', '.join(BUDGETS)}")
    both = sparsity if isinstance(sparsity, tuple) else (sparsity, sparsity)
    least = (MIN_HEADS, -(-MIN_NEURONS // sizes.block))
    found = []
    for name, share, few in zip(("heads", "blocks"), both, least, strict=True):
        values = getattr(scores, name)
        shape = (sizes.num_layers, getattr(sizes, name))
        if values.shape[-2:] != shape:
            raise InputError(
                f"scores of {name} are {list(values.shape)}, the model's {list(shape)}"
            )
        if not isinstance(values, jax.core.Tracer) and np.isnan(np.asarray(values)).any():
            bad = np.argwhere(np.isnan(np.asarray(values)))[0]
            raise InputError(f"NaN among the scores of {name}, the first at {bad.tolist()}")
        few = 0 if budget == "global" else min(few, shape[1])
        prune = _local if budget == "local" else _pooled
        later = prune(values[..., sizes.first :, :], check_sparsity(share), few)
        ones = jnp.ones((*values.shape[:-2], sizes.first, shape[1]), bool)
        found.append(jnp.concatenate([ones, later], axis=-2))
    return Mask(*found)


def _local(values_LU: Any, sparsity: float, least: int) -> jax.Array:
    del least
    return _rank(values_LU) < num_kept(values_LU.shape[-1], sparsity)


def _pooled(values_LU: Any, sparsity: float, least: int) -> jax.Array:
    """Keeps the best of all layers together, each layer's `least` best ones before any other."""
    num_layers, num_units = values_LU.shape[-2:]
    safe = _rank(values_LU) < least
    flat = jnp.where(safe, jnp.inf, values_LU).reshape(*values_LU.shape[:-2], -1)
    keep = max(num_kept(num_layers * num_units, sparsity), num_layers * least)
    return (_rank(flat) < keep).reshape(values_LU.shape)


def _rank(values: Any) -> jax.Array:
    """0 for the largest of the last dim; the earlier of equal ones first."""
    order = jnp.argsort(-jnp.asarray(values), axis=-1, stable=True)
    return jnp.argsort(order, axis=-1)


def kept_of(mask: Mask, sizes: Sizes) -> Kept:
    """The lists of a mask of equally many units per layer; InputError if they are not equally many.

    Inverse: `mask_of`.
    """
    found = []
    for name in ("heads", "blocks"):
        part = np.asarray(getattr(mask, name)).astype(bool)
        if not part[..., : sizes.first, :].all():
            raise InputError(f"{name} of the first {sizes.first} layers are pruned; they are dense")
        part = part[..., sizes.first :, :]
        counts = part.sum(-1)
        if counts.min() != counts.max():
            raise InputError(
                f"{counts.min()} to {counts.max()} {name} are kept per layer: lists of fixed "
                "length need a local budget"
            )
        index = np.nonzero(part)[-1].reshape(*part.shape[:-1], int(counts.max()))
        found.append(jnp.asarray(index, jnp.int32))
    return Kept(*found)


def mask_of(kept: Kept, sizes: Sizes) -> Mask:
    """The bool mask of lists. Inverse: `kept_of`."""

    def part(index, num_units: int):
        later = (index[..., None] == jnp.arange(num_units)).any(-2)
        ones = jnp.ones((*later.shape[:-2], sizes.first, num_units), bool)
        return jnp.concatenate([ones, later], axis=-2)

    return Mask(part(kept.heads, sizes.heads), part(kept.blocks, sizes.blocks))


def full_mask(sizes: Sizes) -> Mask:
    """The mask that prunes nothing."""
    shapes = ((sizes.num_layers, n) for n in (sizes.heads, sizes.blocks))
    return Mask(*(jnp.ones(shape, bool) for shape in shapes))


def per_head(mask: Mask, config: ModelConfig, sizes: Sizes) -> jax.Array:
    """The heads' part for every query head, [..., L, H], whatever the unit."""
    repeats = config.num_heads // sizes.heads
    return jnp.repeat(mask.heads, repeats, axis=-1)


def per_neuron(mask: Mask, config: ModelConfig, sizes: Sizes) -> jax.Array:
    """The blocks' part for every neuron, [..., L, F] or [..., L, E, F]."""
    spread = jnp.repeat(mask.blocks, sizes.block, axis=-1)
    return spread.reshape(*spread.shape[:-1], *one_neuron_shape(config))


def inserted_of(mask: Mask, config: ModelConfig, sizes: Sizes, dense_B: Any = None) -> Inserted:
    """What `transformer.forward(inserted=)` takes: a mask [L, units], [B, L, units] by row, or
    [B, T, L, units] by token.

    dense_B: tokens at the start of each row that stay dense (`moejax.models.masked.masking`).
    """
    heads, neurons = per_head(mask, config, sizes), per_neuron(mask, config, sizes)
    if mask.heads.ndim == 2:
        heads, neurons = heads[None], neurons[None]
    layers = heads.ndim - 2
    heads, neurons = (jnp.moveaxis(x, layers, 0) for x in (heads, neurons))
    return masking(config, heads, neurons, dense_B)
