"""Activations by name, and the shapes of a gated feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable

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
