"""The gated feed-forward layer: of a dense block, and of one expert."""

from collections.abc import Callable
from typing import Any

import jax

from moejax.ops import by_rows
from moejax.ops.wide_product import wide_product

Activation = Callable[[jax.Array], jax.Array]


def gated_ffn(
    params: dict[str, Any],
    x: jax.Array,
    activation: Activation,
    on_neurons: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """``(act(x W_gate) * (x W_up)) W_down`` (Shazeer 2020, eq. 6), with biases if there are any.

    params: w_gate, w_up [D, F], w_down [F, D] and maybe b_gate, b_up [F], b_down [D]; they are
    cast to x's dtype, sums are at least float32. x, result: [..., D]. on_neurons changes the
    activations [..., F].
    """

    def affine(x: jax.Array, name: str) -> jax.Array:
        weight = params[f"w_{name}"].astype(x.dtype)
        y = wide_product(by_rows.matmul, x, weight).astype(x.dtype)
        return y + params[f"b_{name}"].astype(x.dtype) if f"b_{name}" in params else y

    hidden = activation(affine(x, "gate")) * affine(x, "up")
    return affine(hidden if on_neurons is None else on_neurons(hidden), "down")


def ffn_shapes(d_model: int, d_ff: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the params of `gated_ffn`."""
    shapes: dict[str, tuple[int, ...]] = {
        "w_gate": (d_model, d_ff),
        "w_up": (d_model, d_ff),
        "w_down": (d_ff, d_model),
    }
    if bias:
        shapes |= {"b_gate": (d_ff,), "b_up": (d_ff,), "b_down": (d_model,)}
    return shapes
