"""Blocks whose weights lie by rows, so that chosen heads and neurons are computed alone.

A unit of heads is one query head, or all that share a group of keys and values; R are its channels.
`by_rows` makes such a layer out of a plain one: attn has rows_q and rows_o [U, R, D] and rows_k and
rows_v [G, C, D] in place of w_*, mlp has rows_gate, rows_up and rows_down [M, P, D], moe has the
experts of `moejax.moe.sparse`; latent attention is in `moejax.models.sparse_mla`. Where attn, mlp
or moe also has

    kept    int32 [K], which units or blocks of neurons are computed; and maybe
    weight  [B, K], factors per row, 0 for what only another row of the batch keeps; or
    ask     {"w_1" [D, hidden], "w_2" [hidden, heads or neurons]}: the list, as long as `kept`, is
            made of what enters the layer, by sums of sigmoid(x w_1 w_2) over a unit; of several
            rows with "keep_B" (`moejax.ops.deciding`)

one token per row is computed with those alone; without, any number of tokens with everything (one
token by the same kernels). Keys and values are computed and kept for every head, so a later token
may use heads that this one skips.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core import tree
from moejax.models.attend import attend
from moejax.models.mha import AttentionInputs, Extend, OnHeads, finished
from moejax.models.sparse_mla import mla_by_rows
from moejax.moe.sparse import rows_of_experts
from moejax.ops.attention import Window
from moejax.ops.deciding import decided
from moejax.ops.gated_ffn import Activation
from moejax.ops.rope import apply_rope
from moejax.ops.sparse_ffn import sparse_ffn
from moejax.ops.sparse_matmul import sparse_matmul


def by_rows(layer: tree.Tree, num_units: int, block: int) -> tree.Tree:
    """A layer's weights by rows. num_units: U, the heads or the groups. block: P."""
    attn, made = dict(layer["attn"]), dict(layer)
    if "w_kv_up" in attn:
        made["attn"] = mla_by_rows(attn)
    else:
        rows = (num_units, -1, attn["w_o"].shape[-1])
        attn["rows_q"] = jnp.transpose(attn.pop("w_q"), (1, 2, 0)).reshape(rows)
        attn |= {f"rows_{name}": jnp.transpose(attn.pop(f"w_{name}"), (1, 2, 0)) for name in "kv"}
        attn["rows_o"] = attn.pop("w_o").reshape(rows)
        made["attn"] = attn
    if "mlp" in layer:
        made["mlp"] = _rows_of_neurons(layer["mlp"], block)
    else:
        made["moe"] = layer["moe"] | {"experts": rows_of_experts(layer["moe"]["experts"], block)}
    return made


def _rows_of_neurons(params: dict[str, Any], block: int) -> dict[str, Any]:
    made = dict(params)
    for name in ("gate", "up"):
        if f"w_{name}" in made:
            w = made.pop(f"w_{name}")
            made[f"rows_{name}"] = w.T.reshape(-1, block, w.shape[0])
        if f"b_{name}" in made:
            made[f"b_{name}"] = made[f"b_{name}"].reshape(-1, block)
    made["rows_down"] = made.pop("w_down").reshape(made["rows_up"].shape)
    return made


def sparse_mha(
    params: dict[str, Any],
    x_BTD: jax.Array,
    inputs: AttentionInputs,
    extend: Extend,
    window: Window = 0,
    on_heads: OnHeads | None = None,
) -> tuple[jax.Array, Any]:
    """`moejax.models.mha.mha` over weights by rows, of the kept units alone if there is a list.

    No keys and values are read but those of kept units, as long as these are no more than there are
    groups: of query heads that share keys and values, one read for each kept head. Of more heads
    than that all groups are read once, since nearly all have a kept one: 5 of 9 heads, drawn at
    random, leave 5% of three groups' keys unread.
    """
    params = decided(params, x_BTD, params["rows_q"].shape[0])
    kept, (num_batch, num_tokens, d_model) = params.get("kept"), x_BTD.shape
    if kept is not None and num_tokens != 1:
        raise ValueError(f"heads are skipped for one token at a time, not {num_tokens}")
    q_BTHC, k_BTGC, v_BTGC = (_projected(params, name, x_BTD, inputs) for name in "qkv")
    if inputs.turn is not None:
        q_BTHC, k_BTGC = (apply_rope(x, *inputs.turn) for x in (q_BTHC, k_BTGC))
    k_BGSC, v_BGSC, state = extend(jnp.swapaxes(k_BTGC, 1, 2), jnp.swapaxes(v_BTGC, 1, 2))
    mixed_BTHC = _attend_kept(params, q_BTHC, (k_BGSC, v_BGSC), inputs, window)
    mixed_BTHC = mixed_BTHC if on_heads is None else on_heads(mixed_BTHC)
    rows_o = params["rows_o"]
    if num_tokens > 1:
        mixed = mixed_BTHC.reshape(num_batch, num_tokens, -1)
        out_BTD = mixed @ rows_o.reshape(-1, d_model)
    else:
        kept = jnp.arange(rows_o.shape[0]) if kept is None else kept
        mixed_BKR = mixed_BTHC.reshape(num_batch, kept.shape[0], rows_o.shape[1])
        if "weight" in params:
            mixed_BKR = mixed_BKR * params["weight"][:, :, None].astype(mixed_BKR.dtype)
        out_BTD = sparse_matmul(mixed_BKR, rows_o, kept)[:, None]
    return (out_BTD + params["b_o"] if "b_o" in params else out_BTD), state


def _projected(
    params: dict[str, Any], name: str, x_BTD: jax.Array, inputs: AttentionInputs
) -> jax.Array:
    """`moejax.models.mha.project`; of queries those of the kept units where there is a list."""
    rows, size = params[f"rows_{name}"], params["rows_k"].shape[1]
    kept = params.get("kept") if name == "q" else None
    norm = params.get(f"{name}_norm")
    # A norm of all heads together reads those of skipped ones too.
    together = norm is not None and norm["scale"].ndim > 1
    chosen = jnp.arange(rows.shape[0]) if kept is None or together else kept
    lead = x_BTD.shape[:2]
    if lead[1] == 1:
        y = sparse_matmul(x_BTD[:, 0], rows, chosen)
    else:
        y = jnp.einsum("btd,rd->btr", x_BTD, rows.reshape(-1, rows.shape[-1]))
    y = y.reshape(*lead, -1, size)
    if f"b_{name}" in params:
        y = y + params[f"b_{name}"].reshape(rows.shape[0], -1)[chosen].reshape(-1, size)
    y = finished(params, name, y, inputs)
    if kept is None or not together:
        return y
    return y.reshape(*lead, rows.shape[0], -1)[:, :, kept].reshape(*lead, -1, size)


def _attend_kept(params, q_BTHC, keys_values, inputs: AttentionInputs, window: Window) -> jax.Array:
    """What the heads of `q_BTHC` mix: all heads, or those of the kept units."""
    kept, num_units = params.get("kept"), params["rows_q"].shape[0]
    k_BGSC, v_BGSC = keys_values
    if kept is None or kept.shape[0] == num_units:
        return attend(q_BTHC, k_BGSC, v_BGSC, inputs, window, inputs.spec)
    num_groups = params["rows_k"].shape[0]
    if kept.shape[0] <= num_groups:
        groups_K = kept // (num_units // num_groups)
        if inputs.visible.pages_BP is None:
            k_BGSC, v_BGSC = k_BGSC[:, groups_K], v_BGSC[:, groups_K]
        else:
            visible = dataclasses.replace(inputs.visible, groups_K=groups_K)
            inputs = dataclasses.replace(inputs, visible=visible)
        return attend(q_BTHC, k_BGSC, v_BGSC, inputs, window, inputs.spec)
    num_batch, num_tokens, _, size = q_BTHC.shape
    q = q_BTHC.reshape(num_batch, num_tokens, kept.shape[0], -1, size)
    whole = jnp.zeros((num_batch, num_tokens, num_units, *q.shape[3:]), q.dtype)
    whole = whole.at[:, :, kept].set(q).reshape(num_batch, num_tokens, -1, size)
    mixed = attend(whole, k_BGSC, v_BGSC, inputs, window, inputs.spec)
    mixed = mixed.reshape(num_batch, num_tokens, num_units, -1, mixed.shape[-1])[:, :, kept]
    return mixed.reshape(num_batch, num_tokens, -1, mixed.shape[-1])


def sparse_feed_forward(
    params: dict[str, Any],
    x_BTD: jax.Array,
    activation: Activation,
    on_neurons: Any = None,
) -> jax.Array:
    """`moejax.models.layers.feed_forward` over weights by rows, of the kept blocks if listed."""
    params = decided(params, x_BTD, params["rows_up"].shape[0])
    kept = params.get("kept")
    if kept is None and x_BTD.shape[1] == 1 and on_neurons is None:
        kept = jnp.arange(params["rows_up"].shape[0])
    if kept is not None:
        assert on_neurons is None and x_BTD.shape[1] == 1
        weight_BK = params.get("weight")
        return sparse_ffn(params, x_BTD[:, 0], kept, activation, weight_BK=weight_BK)[:, None]

    def into(name: str) -> jax.Array:
        rows = params[f"rows_{name}"].reshape(-1, x_BTD.shape[-1])
        y = jnp.einsum("btd,fd->btf", x_BTD, rows, preferred_element_type=jnp.float32)
        y = y.astype(x_BTD.dtype)
        return y + params[f"b_{name}"].reshape(-1) if f"b_{name}" in params else y

    h = activation(into("gate")) * into("up") if "rows_gate" in params else activation(into("up"))
    h = h if on_neurons is None else on_neurons(h)
    rows = params["rows_down"].reshape(-1, x_BTD.shape[-1])
    out = jnp.matmul(h, rows, preferred_element_type=jnp.float32).astype(x_BTD.dtype)
    return out + params["b_down"] if "b_down" in params else out
