"""The MoE layer by its definition: every expert on every token. The oracle for `moejax.moe.layer`.

y_n = sum_e g_ne FFN_e(x_n) + s_n FFN_shared(x_n), where g is zero for the experts that the router
did not choose, and s is 1, sigmoid(x_n w_mix), or 0 without a shared network.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.moe.config import MoEConfig
from moejax.moe.routing import route
from moejax.moe.scores import expert_inputs
from moejax.ops.gated_ffn import Activation, gated_ffn


def dense_moe(
    params: dict[str, Any],
    x_BTD: jax.Array,
    config: MoEConfig,
    *,
    activation: Activation = jax.nn.silu,
    mask_BT: jax.Array | None = None,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Computes all E experts on all tokens and mixes them by the router's weights; [B, T, D]."""
    num_sequences, _, d_model = x_BTD.shape
    x_ND = x_BTD.reshape(-1, d_model)
    mask_N = None if mask_BT is None else mask_BT.reshape(-1)
    routing = route(
        params["router"], x_ND, config, mask_N=mask_N, rng=rng, num_sequences=num_sequences
    )
    x_ND = expert_inputs(x_ND, config, rng)
    weights_NE = routing.dense_weights(x_ND.shape[0], config.num_experts)
    outputs_END = jax.vmap(lambda expert: gated_ffn(expert, x_ND, activation))(params["experts"])
    y_ND = jnp.einsum("end,ne->nd", outputs_END, weights_NE)
    if config.shared_ffn:
        shared_ND = gated_ffn(params["shared"], x_ND, activation)
        if config.shared_gate:
            shared_ND *= jax.nn.sigmoid(x_ND @ params["shared"]["w_mix"])
        y_ND += shared_ND
    return y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape)
