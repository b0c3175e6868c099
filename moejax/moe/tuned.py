"""Experts of which a few are trained: the rest gets no gradient, and no work is done for one.

An expert stack may carry, beside its own leaves, a dict "tuned" of the same names with the M
experts that are trained ([M, D, F]) and `ids_M`, where each belongs in the stack: ascending, and
outside 0 .. E - 1 where there is none (padding; on a mesh an expert of another device). What the
stack itself holds at those places is not used.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moejax.ops.gated_ffn import Activation
from moejax.ops.grouped_matmul import grouped_matmul


def merged(stack_E: jax.Array, tuned_M: jax.Array, ids_M: jax.Array) -> jax.Array:
    """The stack with the trained experts in their places."""
    num_experts = stack_E.shape[0]
    at_M = jnp.where((ids_M >= 0) & (ids_M < num_experts), ids_M, num_experts)
    return stack_E.at[at_M].set(tuned_M.astype(stack_E.dtype), mode="drop", unique_indices=True)


def first_expert(experts: dict[str, Any]) -> dict[str, jax.Array]:
    """Expert 0 of a stack, XFT's shared one, as it is trained or not."""
    if "tuned" not in experts:
        return {name: stack[0] for name, stack in experts.items()}
    tuned = experts["tuned"]
    is_first = tuned["ids_M"][0] == 0  # they ascend

    def first(name: str) -> jax.Array:
        stack = experts[name]
        return jnp.where(is_first, tuned[name][0].astype(stack.dtype), stack[0])

    return {name: first(name) for name in experts if name != "tuned"}


def tuned_ffn(
    params: dict[str, Any],
    rows_RD: jax.Array,
    group_sizes_E: jax.Array,
    activation: Activation,
    implementation: str | None = None,
) -> jax.Array:
    """`moejax.moe.experts.grouped_ffn` with trained experts in the stacks' "tuned"."""
    tuned = params["tuned"]
    ids_M = tuned["ids_M"]
    expert_R = jnp.searchsorted(
        jnp.cumsum(group_sizes_E), jnp.arange(rows_RD.shape[0]), side="right"
    )

    def affine(x_R: jax.Array, name: str) -> jax.Array:
        w, own = (p[f"w_{name}"].astype(x_R.dtype) for p in (params, tuned))
        y_R = tuned_matmul(implementation, x_R, w, own, ids_M, group_sizes_E)
        if f"b_{name}" in params:
            b = merged(params[f"b_{name}"], tuned[f"b_{name}"], ids_M)
            y_R = y_R + b.astype(x_R.dtype)[expert_R]
        return y_R

    return affine(activation(affine(rows_RD, "gate")) * affine(rows_RD, "up"), "down")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tuned_matmul(
    implementation: str | None,
    lhs: jax.Array,
    stack_EKN: jax.Array,
    tuned_MKN: jax.Array,
    ids_M: jax.Array,
    group_sizes: jax.Array,
) -> jax.Array:
    """`grouped_matmul` of lhs [R, K] with the merged stacks; differentiable in lhs and tuned_MKN.

    The gradient of stack_EKN is taken to be zero. That of tuned_MKN is computed for its own groups
    of rows only (`grouped_matmul`'s `groups`; the implementations `ref` and `ragged_dot` know no
    such thing and do the others' work too), and needs 2 M matrices of memory, not E.
    """
    whole = merged(stack_EKN, tuned_MKN, ids_M)
    return grouped_matmul(lhs, whole, group_sizes, implementation=implementation)


def _forward(implementation, lhs, stack_EKN, tuned_MKN, ids_M, group_sizes):
    # The parts are kept and merged again: a merged stack would be a copy of all experts per layer.
    out = tuned_matmul(implementation, lhs, stack_EKN, tuned_MKN, ids_M, group_sizes)
    return out, (lhs, stack_EKN, tuned_MKN, ids_M, group_sizes)


def _backward(implementation, saved, d_out):
    lhs, stack_EKN, tuned_MKN, ids_M, group_sizes = saved
    whole = merged(stack_EKN, tuned_MKN, ids_M)
    _, back = jax.vjp(
        lambda x: grouped_matmul(x, whole, group_sizes, implementation=implementation), lhs
    )
    d_tuned = weight_gradient(lhs, d_out, ids_M, group_sizes, implementation)
    return back(d_out)[0], None, d_tuned.astype(tuned_MKN.dtype), None, None


tuned_matmul.defvjp(_forward, _backward)


def weight_gradient(
    lhs: jax.Array,
    d_out: jax.Array,
    ids_M: jax.Array,
    group_sizes: jax.Array,
    implementation: str | None = None,
) -> jax.Array:
    """Sum over the rows of group ids[m] of lhs[r] d_out[r]^T: [M, K, N]; ids ascending.

    The rows between two wanted groups are one group that nobody asks for, so that a kernel sees 2 M
    groups: unwanted, wanted, unwanted, ...
    """
    num_wanted, num_groups = ids_M.shape[0], group_sizes.shape[0]
    bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(group_sizes, dtype=jnp.int32)])
    here_M = (ids_M >= 0) & (ids_M < num_groups)
    starts_M = bounds[jnp.clip(ids_M, 0, num_groups)]
    sizes_M = jnp.where(here_M, group_sizes[jnp.clip(ids_M, 0, num_groups - 1)], 0)
    ends_M = starts_M + sizes_M
    gaps_M = starts_M - jnp.concatenate([jnp.zeros(1, jnp.int32), ends_M[:-1]])
    sizes = jnp.stack([gaps_M, sizes_M], axis=1).reshape(-1)
    wanted = jnp.stack([jnp.zeros_like(here_M), here_M], axis=1).reshape(-1)
    nothing = jnp.zeros((2 * num_wanted, lhs.shape[1], d_out.shape[1]), lhs.dtype)
    _, back = jax.vjp(
        lambda w: grouped_matmul(lhs, w, sizes, implementation=implementation, groups=wanted),
        nothing,
    )
    return back(d_out)[0][1::2]
