"""Attention where it runs: here, or on a mesh, every device with rows and heads of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
from jax.sharding import PartitionSpec

from moejax.core.mesh import TOKEN_AXES
from moejax.ops.attention import AttentionSpec, Window, attention

if TYPE_CHECKING:
    from moejax.models.mha import AttentionInputs

P = PartitionSpec
_ROWS = P(TOKEN_AXES)


def local_shape(
    q_shape: tuple[int, int, int], num_groups: int, axes: Mapping[str, int]
) -> tuple[int, int, int]:
    """Queries [B, T, H] as one device of the mesh has them."""
    num_rows, num_tokens, num_heads = q_shape
    parts = math.prod(axes[axis] for axis in TOKEN_AXES)
    heads = axes["tensor"] if _splits(num_groups, axes) else 1
    return max(1, num_rows // parts), num_tokens, num_heads // heads


def attend(
    q_BTHC: jax.Array,
    k_BGSC: jax.Array,
    v_BGSC: jax.Array,
    inputs: AttentionInputs,
    window: Window,
    spec: AttentionSpec,
) -> jax.Array:
    """`moejax.ops.attention.attention`; on a mesh inside a shard_map.

    Rows are independent and so are groups of heads, so nothing is exchanged: XLA is not left to
    find that out, nor to split a kernel, which it cannot. Heads stay together where the groups do
    not divide by "tensor". What reads from a cache is left to XLA.
    """
    mesh, visible = inputs.mesh, inputs.visible
    if mesh is None or visible.slot is not None:
        return attention(q_BTHC, k_BGSC, v_BGSC, visible, window, spec)
    heads = "tensor" if _splits(k_BGSC.shape[1], mesh.shape) else None
    shared = visible.mask_BTS is not None and visible.mask_BTS.shape[0] == 1
    places = dataclasses.replace(
        jax.tree.map(lambda _: _ROWS, visible), **({"mask_BTS": P()} if shared else {})
    )
    known = isinstance(window, int)  # then it decides which blocks exist

    def local(q, k, v, visible, moving):
        return attention(q, k, v, visible, window if known else moving, spec)

    queries, keys = P(TOKEN_AXES, None, heads), P(TOKEN_AXES, heads)
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(queries, keys, keys, places, None if known else P()),
        out_specs=queries,
        check_vma=False,  # a kernel does not say how its results vary
    )
    return mapped(q_BTHC, k_BGSC, v_BGSC, visible, None if known else window)


def _splits(num_groups: int, axes: Mapping[str, int]) -> bool:
    return num_groups % axes["tensor"] == 0
