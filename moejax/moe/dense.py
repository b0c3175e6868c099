"""The MoE layer by its definition: every expert on every token. The oracle for `moejax.moe.layer`.

y_n = sum_e g_ne FFN_e(x_n), where g is zero for the experts that the router did not choose.
"""

import jax
import jax.numpy as jnp

from moejax.moe.config import MoEConfig
from moejax.moe.routing import route
from moejax.ops.gated_ffn import Activation, gated_ffn


def dense_moe(
    params: dict[str, dict[str, jax.Array]],
    x_BTD: jax.Array,
    config: MoEConfig,
    *,
    activation: Activation = jax.nn.silu,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Computes all E experts on all tokens and mixes them by the router's weights; [B, T, D]."""
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    routing = route(params["router"], x_ND, config, rng=rng)
    chosen_NKE = jax.nn.one_hot(routing.experts_NK, config.num_experts)
    weights_NE = jnp.einsum("nke,nk->ne", chosen_NKE, routing.weights_NK)
    if routing.shared_weight_N is not None:
        weights_NE = weights_NE.at[:, 0].set(routing.shared_weight_N)
    outputs_END = jax.vmap(lambda expert: gated_ffn(expert, x_ND, activation))(params["experts"])
    y_ND = jnp.einsum("end,ne->nd", outputs_END, weights_NE).astype(x_BTD.dtype)
    return y_ND.reshape(x_BTD.shape)
