"""The small parts of a block: activations, norms and feed-forward layers, chosen by the config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from moejax.models.config import ModelConfig
from moejax.models.sparse import sparse_feed_forward
from moejax.ops import by_rows
from moejax.ops.gated_ffn import Activation, ffn_shapes, gated_ffn
from moejax.ops.norm import layer_norm, rms_norm, rms_norm_delta
from moejax.ops.wide_product import wide_product

ACTIVATION: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
_NORM_LEAVES = {
    "rms": ("scale",),
    "rms_delta": ("delta",),
    "layer": ("scale", "bias"),
    "layer_plain": (),
}


def norm_shapes(kind: str, size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a norm's parameters; a plain one has none."""
    return {name: (size,) for name in _NORM_LEAVES[kind]}


def norm(kind: str, params: dict[str, Any], x: jax.Array, eps: float) -> jax.Array:
    """The norm of this kind (`NormConfig`) over the last dim of x."""
    if kind == "rms":
        return rms_norm(x, params["scale"], eps)
    if kind == "rms_delta":
        return rms_norm_delta(x, params["delta"], eps)
    return layer_norm(x, eps, params.get("scale"), params.get("bias"))


def feed_forward_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a dense layer's feed-forward parameters."""
    shapes = ffn_shapes(config.d_model, config.d_ff, config.mlp_bias)
    if config.gated:
        return shapes
    return {name: shape for name, shape in shapes.items() if not name.endswith("_gate")}


def feed_forward(
    params: dict[str, Any],
    x: jax.Array,
    activation: Activation,
    on_neurons: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """`gated_ffn`, or ``act(x W_up + b_up) W_down + b_down`` where there is no gate.

    Weights by rows are `moejax.models.sparse.sparse_feed_forward`'s.
    """
    if "rows_up" in params:
        return sparse_feed_forward(params, x, activation, on_neurons)
    if "w_gate" in params:
        return gated_ffn(params, x, activation, on_neurons)

    def affine(x: jax.Array, name: str) -> jax.Array:
        y = wide_product(by_rows.matmul, x, params[f"w_{name}"]).astype(x.dtype)
        return y + params[f"b_{name}"] if f"b_{name}" in params else y

    hidden = activation(affine(x, "up"))
    return affine(hidden if on_neurons is None else on_neurons(hidden), "down")
