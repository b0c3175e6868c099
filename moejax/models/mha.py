"""Multi-head attention with grouped keys and values, and rotary positions where there are any."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moejax.models.attend import attend
from moejax.ops import by_rows
from moejax.ops.attention import AttentionSpec
from moejax.ops.attention_spec import Visible, Window
from moejax.ops.norm import rms_norm
from moejax.ops.rope import apply_rope

# Takes this call's keys and values and gives back all that the queries may see, plus new state.
Extend = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, Any]]
# Takes what the heads mixed, [B, T, H, C], and gives what the output projection reads.
OnHeads = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """What every layer's attention shares.

    Attributes:
      turn: cosines and sines of the positions, each [B, T, C/2]; None without rope.
      visible: which keys a query sees, windows aside.
      spec: scale, soft cap, and how to compute.
      norm_eps: of the norms of queries and keys.
      clip: bound of queries, keys and values; None: none.
      mesh: the devices that rows and heads are split over; None is one.
    """

    turn: tuple[jax.Array, jax.Array] | None
    visible: Visible
    spec: AttentionSpec
    norm_eps: float
    clip: float | None = None
    mesh: Mesh | None = None


def attention_shapes(config) -> dict[str, tuple[int, ...]]:
    """Path -> shape of one layer's attention parameters."""
    d, h, g, c = config.d_model, config.num_heads, config.num_kv_heads, config.head_size
    shapes: dict[str, tuple[int, ...]] = {
        "w_q": (d, h, c),
        "w_k": (d, g, c),
        "w_v": (d, g, c),
        "w_o": (h, c, d),
    }
    if config.attention_bias:
        shapes |= {"b_q": (h, c), "b_k": (g, c), "b_v": (g, c)}
    if config.output_bias:
        shapes["b_o"] = (d,)
    if config.attention.qk_norm == "head":
        shapes |= {"q_norm/scale": (c,), "k_norm/scale": (c,)}
    if config.attention.qk_norm == "all":
        shapes |= {"q_norm/scale": (h, c), "k_norm/scale": (g, c)}
    return shapes


def mha(
    params: dict[str, Any],
    x_BTD: jax.Array,
    inputs: AttentionInputs,
    extend: Extend,
    window: Window = 0,
    on_heads: OnHeads | None = None,
) -> tuple[jax.Array, Any]:
    """Projects, rotates, attends, projects back. Returns ([B, T, D], extend's new state)."""

    q_BTHC, k_BTGC, v_BTGC = (project(params, name, x_BTD, inputs) for name in "qkv")
    if inputs.turn is not None:
        q_BTHC, k_BTGC = (apply_rope(x, *inputs.turn) for x in (q_BTHC, k_BTGC))
    k_BGSC, v_BGSC, state = extend(jnp.swapaxes(k_BTGC, 1, 2), jnp.swapaxes(v_BTGC, 1, 2))
    mixed_BTHC = attend(q_BTHC, k_BGSC, v_BGSC, inputs, window, inputs.spec)
    mixed_BTHC = mixed_BTHC if on_heads is None else on_heads(mixed_BTHC)
    # One product over H * C: for an einsum over two dims XLA transposes the weights first.
    w_o = params["w_o"].reshape(-1, x_BTD.shape[-1])
    out_BTD = by_rows.matmul(mixed_BTHC.reshape(*x_BTD.shape[:2], -1), w_o)
    return (out_BTD + params["b_o"] if "b_o" in params else out_BTD), state


def project(
    params: dict[str, Any], name: str, x_BTD: jax.Array, inputs: AttentionInputs
) -> jax.Array:
    """Queries "q", keys "k" or values "v" of x, [B, T, heads, C], before rope."""
    y = by_rows.einsum("...d,dhc->...hc", x_BTD, params[f"w_{name}"])
    y = y + params[f"b_{name}"] if f"b_{name}" in params else y
    return finished(params, name, y, inputs)


def finished(
    params: dict[str, Any], name: str, y_BTHC: jax.Array, inputs: AttentionInputs
) -> jax.Array:
    """What follows such a projection: its norm, per head or of all heads together, and the clip."""
    if f"{name}_norm" in params:
        scale, shape = params[f"{name}_norm"]["scale"], y_BTHC.shape
        y = y_BTHC if scale.ndim == 1 else y_BTHC.reshape(*shape[:2], -1)
        y_BTHC = rms_norm(y, scale.reshape(-1), inputs.norm_eps).reshape(shape)
    return y_BTHC if inputs.clip is None else jnp.clip(y_BTHC, -inputs.clip, inputs.clip)
