"""Experts whose weights lie by rows, of which chosen blocks of neurons are computed alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moejax.core.errors import InputError
from moejax.moe.config import MoEConfig
from moejax.moe.layer import MoEStats, add_shared_network, layer_stats, moe_layer
from moejax.moe.routing import route
from moejax.moe.scores import expert_inputs
from moejax.ops.deciding import decided
from moejax.ops.gated_ffn import Activation
from moejax.ops.sparse_ffn import sparse_ffn


def rows_of_experts(params: dict[str, Any], block: int) -> dict[str, Any]:
    """Experts with rows_gate, rows_up and rows_down [E F / P, P, D] in place of w_*; P = block."""
    if "tuned" in params:
        raise InputError("experts with ESFT's parts are not laid out: merge them in first")
    num_experts, num_neurons, d_model = params["w_down"].shape
    made = {"rows_down": params["w_down"].reshape(-1, block, d_model)}
    for name in ("gate", "up"):
        w_EFD = jnp.swapaxes(params[f"w_{name}"], 1, 2)
        made[f"rows_{name}"] = w_EFD.reshape(-1, block, d_model)
    for name, bias in params.items():
        if name.startswith("b_"):
            by_block = (num_experts * num_neurons // block, block)
            made[name] = bias if name == "b_down" else bias.reshape(by_block)
    return made


def experts_of_rows(rows: dict[str, Any], num_experts: int) -> dict[str, Any]:
    """Inverse of `rows_of_experts`; copies gate and up."""
    d_model = rows["rows_down"].shape[-1]
    made = {"w_down": rows["rows_down"].reshape(num_experts, -1, d_model)}
    for name in ("gate", "up"):
        w_EFD = rows[f"rows_{name}"].reshape(num_experts, -1, d_model)
        made[f"w_{name}"] = jnp.swapaxes(w_EFD, 1, 2)
    for name, bias in rows.items():
        if name.startswith("b_"):
            made[name] = bias.reshape(num_experts, -1)
    return made


def sparse_moe(
    params: dict[str, Any],
    x_BTD: jax.Array,
    config: MoEConfig,
    *,
    activation: Activation = jax.nn.silu,
    mask_BT: jax.Array | None = None,
    rng: jax.Array | None = None,
    trace: bool = False,
    parallel: Any = None,
) -> tuple[jax.Array, MoEStats]:
    """`moe_layer` over experts by rows; of the kept blocks alone where params have a list.

    params: those of `moe_layer`, with `rows_of_experts`' experts, and maybe kept int32 [K], blocks
    of all experts together in their order, with weight [B, K] or ask (`moejax.models.sparse`). Then
    x is one token a row, and only kept blocks of experts that some row chose are read: at most what
    the rows' experts have, and what is over of that length reads one block again. Without a list
    (prompts) gate and up are copied back first.
    """
    if parallel is not None:
        raise InputError("experts laid out by rows run on one device")
    rows = params["experts"]
    params = decided(params, x_BTD, rows["rows_up"].shape[0])
    how: dict[str, Any] = {"activation": activation, "mask_BT": mask_BT, "rng": rng, "trace": trace}
    if "kept" not in params:
        whole = params | {"experts": experts_of_rows(rows, config.num_experts)}
        return moe_layer(whole, x_BTD, config, **how)
    num_rows, num_tokens, d_model = x_BTD.shape
    assert num_tokens == 1
    x_BD, mask_B = x_BTD[:, 0], None if mask_BT is None else mask_BT[:, 0]
    routing = route(params["router"], x_BD, config, mask_N=mask_B, rng=rng, num_sequences=num_rows)
    x_BD = expert_inputs(x_BD, config, rng)
    weights_BE = routing.dense_weights(num_rows, config.num_experts)
    kept_K, per_expert = params["kept"], rows["rows_up"].shape[0] // config.num_experts
    factors_BK = weights_BE[:, kept_K // per_expert]
    if "weight" in params:
        factors_BK = factors_BK * params["weight"].astype(factors_BK.dtype)
    every = config.selection == "expert_choice"  # then a token may have any number of experts
    experts_per_row = config.num_experts if every else config.top_k
    most = min(kept_K.shape[0], num_rows * experts_per_row * per_expert)
    use_J, at_J = jax.lax.top_k(jnp.abs(factors_BK).max(axis=0), most)
    chosen_J = jnp.where(use_J > 0, kept_K[at_J], kept_K[at_J[0]])
    no_down = {name: w for name, w in rows.items() if name != "b_down"}
    y_BD = sparse_ffn(no_down, x_BD, chosen_J, activation, weight_BK=factors_BK[:, at_J])
    if "b_down" in rows:
        y_BD = y_BD + (weights_BE @ rows["b_down"]).astype(y_BD.dtype)
    y_BD = add_shared_network(params, y_BD.astype(x_BD.dtype), x_BD, activation)
    stats = layer_stats(routing, x_BTD.shape[:2] if trace else None)
    return y_BD.astype(x_BTD.dtype)[:, None], stats
