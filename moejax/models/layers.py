"""The dense parts of a block: the gated feed-forward layer, and the shapes of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

ACTIVATION: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def mlp_shapes(d_model: int, d_ff: int, bias: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of one gated feed-forward layer (or of one expert)."""
    shapes: dict[str, tuple[int, ...]] = {
        "w_gate": (d_model, d_ff),
        "w_up": (d_model, d_ff),
        "w_down": (d_ff, d_model),
    }
    if bias:
        shapes |= {"b_gate": (d_ff,), "b_up": (d_ff,), "b_down": (d_model,)}
    return shapes


def gated_mlp(params: dict[str, Any], x: jax.Array, activation: str) -> jax.Array:
    """``(act(x W_gate) * (x W_up)) W_down`` (Shazeer 2020, eq. 6), with optional biases. x: [..., D]."""

    def linear(x, name):
        y = x @ params[f"w_{name}"]
        return y + params[f"b_{name}"] if f"b_{name}" in params else y

    hidden = ACTIVATION[activation](linear(x, "gate")) * linear(x, "up")
    return linear(hidden, "down")
