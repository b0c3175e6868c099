"""Latent attention whose weights lie by heads, so that chosen heads are computed alone.

    rows_q [H, C, X]   of w_q (X = D) or of w_q_up (X = the queries' rank)
    rows_k_up [H, N, R], rows_v_up [H, V, R]   of w_kv_up
    rows_o [H, V, D]   of w_o

What is left of the layer, w_q_down and w_kv_down, is as it was: of every token the latent vector is
computed and kept, so a later token may use heads that this one skips. Of skipped heads neither
queries nor scores nor values nor outputs are computed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moejax.models.attend import attend
from moejax.models.mha import AttentionInputs, Extend, OnHeads
from moejax.models.mla import MLAConfig, latent, mla, query_input, scaled, turned
from moejax.ops.attention_spec import Window
from moejax.ops.deciding import decided
from moejax.ops.sparse_matmul import sparse_matmul


def mla_by_rows(attn: dict[str, Any]) -> dict[str, Any]:
    """A layer's attention with its projections by heads. Inverse: `mla_by_columns`."""
    made = dict(attn)
    queries = "w_q" if "w_q" in made else "w_q_up"
    made["rows_q"] = jnp.transpose(made.pop(queries), (1, 2, 0))
    up_HCR = jnp.transpose(made.pop("w_kv_up"), (1, 2, 0))
    made["rows_o"] = made.pop("w_o")
    v_size = made["rows_o"].shape[1]
    made["rows_k_up"], made["rows_v_up"] = up_HCR[:, :-v_size], up_HCR[:, -v_size:]
    return made


def mla_by_columns(attn: dict[str, Any]) -> dict[str, Any]:
    """What `mla` reads; copies. Inverse: `mla_by_rows`."""
    made = dict(attn)
    queries = "w_q_up" if "w_q_down" in made else "w_q"
    made[queries] = jnp.transpose(made.pop("rows_q"), (2, 0, 1))
    up_HCR = jnp.concatenate([made.pop("rows_k_up"), made.pop("rows_v_up")], axis=1)
    made["w_kv_up"] = jnp.transpose(up_HCR, (2, 0, 1))
    made["w_o"] = made.pop("rows_o")
    return made


def sparse_mla(
    config: MLAConfig,
    params: dict[str, Any],
    x_BTD: jax.Array,
    inputs: AttentionInputs,
    extend: Extend,
    window: Window = 0,
    on_heads: OnHeads | None = None,
) -> tuple[jax.Array, Any]:
    """`moejax.models.mla.mla` over weights by heads, of the kept ones alone if there is a list.

    params: those of `mla_by_rows`, and maybe kept int32 [K] with weight [B, K] or ask as
    `moejax.models.sparse` has them; then x is one token a row. Several tokens are read with every
    head, and weights are copied back first.
    """
    params = decided(params, x_BTD, params["rows_q"].shape[0])
    kept = params.get("kept")
    if x_BTD.shape[1] > 1:
        if kept is not None:
            raise ValueError(f"heads are skipped for one token at a time, not {x_BTD.shape[1]}")
        return mla(config, mla_by_columns(params), x_BTD, inputs, extend, window, on_heads)
    kept = jnp.arange(params["rows_q"].shape[0]) if kept is None else kept
    latent_B1SK = latent(config, params, x_BTD, inputs)[:, None]
    latent_B1SK, _, state = extend(latent_B1SK, latent_B1SK[..., :0])
    asking_BX = query_input(config, params, x_BTD)[:, 0]
    q_B1KC = sparse_matmul(asking_BX, params["rows_q"], kept)[:, None]
    still, turning = jnp.split(q_B1KC, [config.nope_size], axis=-1)
    asked_BKR = _of_each_head("bn,nr->br", still[:, 0], params["rows_k_up"], kept)
    q_B1KZ = jnp.concatenate([asked_BKR[:, None], turned(config, turning, inputs)], axis=-1)
    mixed_B1KZ = attend(
        q_B1KZ, latent_B1SK, latent_B1SK, inputs, window, scaled(config, inputs.spec)
    )
    mixed_BKR = mixed_B1KZ[:, 0, :, : config.kv_rank]
    mixed_BKV = _of_each_head("br,vr->bv", mixed_BKR, params["rows_v_up"], kept)
    mixed_BKV = mixed_BKV if on_heads is None else on_heads(mixed_BKV[:, None])[:, 0]
    if "weight" in params:
        mixed_BKV = mixed_BKV * params["weight"][:, :, None].astype(mixed_BKV.dtype)
    out_BTD = sparse_matmul(mixed_BKV, params["rows_o"], kept)[:, None]
    return (out_BTD + params["b_o"] if "b_o" in params else out_BTD), state


def _of_each_head(form: str, x_BKX: jax.Array, rows: jax.Array, kept_K: jax.Array) -> jax.Array:
    """[B, K, ...]: every kept head's x times its own matrix, one head after the other."""

    def one(at: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_BX, head = at
        return jnp.einsum(form, x_BX, jax.lax.dynamic_index_in_dim(rows, head, keepdims=False))

    return jnp.swapaxes(jax.lax.map(one, (jnp.swapaxes(x_BKX, 0, 1), kept_K)), 0, 1)
