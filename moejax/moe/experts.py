"""Gated feed-forward experts, each on its own group of rows."""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.moe.tuned import tuned_ffn
from moejax.ops.gated_ffn import Activation
from moejax.ops.group_sizes import GroupSizes, plain
from moejax.ops.grouped_ffn_cpu import grouped_ffn_cpu
from moejax.ops.grouped_gated import grouped_gated
from moejax.ops.grouped_matmul import chosen, grouped_matmul

ExpertParams = dict[str, Any]  # stacks by name, and maybe "tuned" (`moejax.moe.tuned`)
_HIDDEN = ("w_gate", "w_up", "b_gate", "b_up")


def grouped_ffn(
    params: ExpertParams,
    rows_RD: jax.Array,
    group_sizes_E: jax.Array,
    activation: Activation,
    implementation: str | None = None,
) -> jax.Array:
    """`gated_ffn` with expert e on the e-th group of rows; params carry a leading E.

    Rows past the groups give zeros and pass no gradient.
    """
    if "tuned" in params:
        return tuned_ffn(params, rows_RD, group_sizes_E, activation, implementation)
    biased = any(name.startswith("b_") for name in params)
    if chosen(implementation) == "cpu" and not biased and rows_RD.shape[0]:
        ws = (params[name].astype(rows_RD.dtype) for name in ("w_gate", "w_up", "w_down"))
        return grouped_ffn_cpu(activation, rows_RD, *ws, group_sizes_E)
    hidden_RF = grouped_hidden(params, rows_RD, group_sizes_E, activation, implementation)
    return grouped_down(params, hidden_RF, group_sizes_E, implementation)


def grouped_hidden(
    params: ExpertParams,
    rows_RD: jax.Array,
    group_sizes_E: GroupSizes,
    activation: Activation,
    implementation: str | None = None,
) -> jax.Array:
    """The first half of `grouped_ffn`: what goes into the down projection, [R, F]."""
    sizes = group_sizes_E
    cast = {name: params[name].astype(rows_RD.dtype) for name in _HIDDEN if name in params}
    if "b_gate" not in cast and "b_up" not in cast:
        matrices = (cast["w_gate"], cast["w_up"])
        return grouped_gated(rows_RD, *matrices, sizes, activation, implementation=implementation)
    gate_RF = grouped_matmul(rows_RD, cast["w_gate"], sizes, implementation=implementation)
    up_RF = grouped_matmul(rows_RD, cast["w_up"], sizes, implementation=implementation)
    gate_RF, up_RF = (
        y_RF + bias_rows(cast, name, y_RF, sizes)
        for name, y_RF in (("b_gate", gate_RF), ("b_up", up_RF))
    )
    return activation(gate_RF) * up_RF


def grouped_down(
    params: ExpertParams,
    hidden_RF: jax.Array,
    group_sizes_E: GroupSizes,
    implementation: str | None = None,
) -> jax.Array:
    """The second half of `grouped_ffn`: hidden rows [R, F] to results [R, D]."""
    sizes, dtype = group_sizes_E, hidden_RF.dtype
    w_down = params["w_down"].astype(dtype)
    y_RD = grouped_matmul(hidden_RF, w_down, sizes, implementation=implementation)
    if "b_down" in params:
        y_RD += bias_rows({"b_down": params["b_down"].astype(dtype)}, "b_down", y_RD, sizes)
    return y_RD


def bias_rows(
    params: ExpertParams, name: str, y_R: jax.Array, group_sizes_E: GroupSizes
) -> jax.Array:
    """Each row's expert's bias, zero past the groups and where there is none."""
    if name not in params:
        return jnp.zeros((), y_R.dtype)
    ends_E = jnp.cumsum(plain(group_sizes_E))
    expert_R = jnp.searchsorted(ends_E, jnp.arange(y_R.shape[0]), side="right")
    inside_R1 = (expert_R < ends_E.shape[0])[:, None]
    return jnp.where(inside_R1, params[name][jnp.minimum(expert_R, ends_E.shape[0] - 1)], 0)
