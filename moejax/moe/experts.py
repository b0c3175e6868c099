"""Gated feed-forward experts, each on its own group of rows."""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.moe.tuned import tuned_ffn
from moejax.ops.gated_ffn import Activation
from moejax.ops.grouped_matmul import grouped_matmul

ExpertParams = dict[str, Any]  # stacks by name, and maybe "tuned" (`moejax.moe.tuned`)


def grouped_ffn(
    params: ExpertParams,
    rows_RD: jax.Array,
    group_sizes_E: jax.Array,
    activation: Activation,
    implementation: str | None = None,
) -> jax.Array:
    """`gated_ffn` with expert e on the e-th group of rows; params carry a leading E."""
    if "tuned" in params:
        return tuned_ffn(params, rows_RD, group_sizes_E, activation, implementation)
    ends_E = jnp.cumsum(group_sizes_E)
    expert_R = jnp.searchsorted(ends_E, jnp.arange(rows_RD.shape[0]), side="right")

    def affine(x_R: jax.Array, name: str) -> jax.Array:
        w = params[f"w_{name}"].astype(x_R.dtype)
        y_R = grouped_matmul(x_R, w, group_sizes_E, implementation=implementation)
        if f"b_{name}" in params:
            y_R = y_R + params[f"b_{name}"].astype(x_R.dtype)[expert_R]
        return y_R

    return affine(activation(affine(rows_RD, "gate")) * affine(rows_RD, "up"), "down")
