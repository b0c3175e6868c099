"""Gated feed-forward experts, each on its own group of rows."""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.moe.tuned import tuned_ffn
from moejax.ops.gated_ffn import Activation
from moejax.ops.grouped_gated import grouped_gated
from moejax.ops.grouped_matmul import grouped_matmul

ExpertParams = dict[str, Any]  # stacks by name, and maybe "tuned" (`moejax.moe.tuned`)


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
    cast = {name: w.astype(rows_RD.dtype) for name, w in params.items()}
    sizes = group_sizes_E
    if "b_gate" in cast or "b_up" in cast:
        gate_RF = grouped_matmul(rows_RD, cast["w_gate"], sizes, implementation=implementation)
        up_RF = grouped_matmul(rows_RD, cast["w_up"], sizes, implementation=implementation)
        gate_RF, up_RF = (
            y_RF + bias_rows(cast, name, y_RF, sizes)
            for name, y_RF in (("b_gate", gate_RF), ("b_up", up_RF))
        )
        hidden_RF = activation(gate_RF) * up_RF
    else:
        hidden_RF = grouped_gated(
            rows_RD,
            cast["w_gate"],
            cast["w_up"],
            sizes,
            activation,
            implementation=implementation,
        )
    y_RD = grouped_matmul(hidden_RF, cast["w_down"], sizes, implementation=implementation)
    if "b_down" in cast:
        y_RD += bias_rows(cast, "b_down", y_RD, sizes)
    return y_RD


def bias_rows(
    params: ExpertParams, name: str, y_R: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """Each row's expert's bias, zero past the groups and where there is none."""
    if name not in params:
        return jnp.zeros((), y_R.dtype)
    ends_E = jnp.cumsum(group_sizes_E)
    expert_R = jnp.searchsorted(ends_E, jnp.arange(y_R.shape[0]), side="right")
    inside_R1 = (expert_R < ends_E.shape[0])[:, None]
    return jnp.where(inside_R1, params[name][jnp.minimum(expert_R, ends_E.shape[0] - 1)], 0)
