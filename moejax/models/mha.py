"""Multi-head attention with rotary positions and grouped keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.ops.attention import attention
from moejax.ops.rope import apply_rope

# Takes this call's keys and values and gives back all that the queries may see, plus new state.
Extend = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """What every layer's attention shares: cos, sin [B, T, C/2] and the bool mask [B, T, S]."""

    cos: jax.Array
    sin: jax.Array
    mask_BTS: jax.Array


def attention_shapes(config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of one layer's attention parameters."""
    d, h, g, c = config.d_model, config.num_heads, config.num_kv_heads, config.head_size
    shapes: dict[str, tuple[int, ...]] = {
        "w_q": (d, h, c),
        "w_k": (d, g, c),
        "w_v": (d, g, c),
        "w_o": (h, c, d),
    }
    if config.attention_bias:
        shapes |= {"b_q": (h, c), "b_k": (g, c), "b_v": (g, c), "b_o": (d,)}
    return shapes


def mha(
    params: dict[str, Any], x_BTD: jax.Array, inputs: AttentionInputs, extend: Extend
) -> tuple[jax.Array, Any]:
    """Projects, rotates, attends, projects back. Returns ([B, T, D], extend's new state)."""

    def project(name):
        y = jnp.einsum("btd,dhc->bthc", x_BTD, params[f"w_{name}"])
        return y + params[f"b_{name}"] if f"b_{name}" in params else y

    q_BTHC = apply_rope(project("q"), inputs.cos, inputs.sin)
    k_BTGC = apply_rope(project("k"), inputs.cos, inputs.sin)
    k_BGSC, v_BGSC, state = extend(jnp.swapaxes(k_BTGC, 1, 2), jnp.swapaxes(project("v"), 1, 2))
    mixed_BTHC = attention(q_BTHC, k_BGSC, v_BGSC, inputs.mask_BTS)
    # One product over H * C: for an einsum over two dims XLA transposes the weights first.
    w_o = params["w_o"].reshape(-1, x_BTD.shape[-1])
    out_BTD = mixed_BTHC.reshape(*x_BTD.shape[:2], -1) @ w_o
    return (out_BTD + params["b_o"] if "b_o" in params else out_BTD), state
