"""Gated feed-forward experts: one of them on all rows, or each on its own group of rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.ops.grouped_matmul import grouped_matmul

Activation = Callable[[jax.Array], jax.Array]
ExpertParams = dict[str, jax.Array]


def expert_ffn(params: ExpertParams, x_ND: jax.Array, activation: Activation) -> jax.Array:
    """w_down (activation(w_gate x) * w_up x), with biases if there are any; [N, D] -> [N, D].

    params: one expert's w_gate, w_up [D, F], w_down [F, D] and maybe b_gate, b_up [F], b_down [D].
    """
    gate_NF = _affine(x_ND, params, "gate")
    up_NF = _affine(x_ND, params, "up")
    return _affine(activation(gate_NF) * up_NF, params, "down")


def grouped_ffn(
    params: ExpertParams,
    rows_RD: jax.Array,
    group_sizes_E: jax.Array,
    activation: Activation,
    implementation: str | None = None,
) -> jax.Array:
    """`expert_ffn` with expert e on the e-th group of rows; params carry a leading E."""
    ends_E = jnp.cumsum(group_sizes_E)
    expert_R = jnp.searchsorted(ends_E, jnp.arange(rows_RD.shape[0]), side="right")

    def affine(x_R: jax.Array, name: str) -> jax.Array:
        w = params[f"w_{name}"].astype(x_R.dtype)
        y_R = grouped_matmul(x_R, w, group_sizes_E, implementation=implementation)
        if f"b_{name}" in params:
            y_R = y_R + params[f"b_{name}"].astype(x_R.dtype)[expert_R]
        return y_R

    return affine(activation(affine(rows_RD, "gate")) * affine(rows_RD, "up"), "down")


def _affine(x: jax.Array, params: ExpertParams, name: str) -> jax.Array:
    y = jnp.matmul(
        x, params[f"w_{name}"].astype(x.dtype), preferred_element_type=jnp.float32
    ).astype(x.dtype)
    if f"b_{name}" in params:
        y = y + params[f"b_{name}"].astype(x.dtype)
    return y
