"""The MoE layer: route, sort tokens by expert, run the experts, put the results back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.moe.config import MoEConfig
from moejax.moe.dispatch import combine, dispatch, plan
from moejax.moe.experts import grouped_ffn
from moejax.moe.routing import abstract_router, init_router, route
from moejax.ops.gated_ffn import Activation, gated_ffn

__all__ = ["MoEStats", "abstract_router", "init_router", "moe_layer"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEStats:
    """What a layer's router did in one forward pass, all float32.

    counts_E: tokens per expert (a shared expert, index 0, gets them all), padding excluded.
    balance_loss: the layer's balance losses, already times balance_weight.
    shared_weight: mean weight of the shared expert over tokens; 0 without one.
    dropped: share of (token, expert) pairs that were not computed; always 0 here.
    """

    counts_E: jax.Array
    balance_loss: jax.Array
    shared_weight: jax.Array
    dropped: jax.Array


def moe_layer(
    params: dict[str, Any],
    x_BTD: jax.Array,
    config: MoEConfig,
    *,
    activation: Activation = jax.nn.silu,
    mask_BT: jax.Array | None = None,
    rng: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, MoEStats]:
    """y = g_0 E_0(x) + sum_i g_i E_i(x) over the chosen experts (XFT, arXiv 2404.15247).

    params: {"router": ..., "experts": {name: [E, ...]}}; x_BTD is the normed input, y_BTD the
    layer's output before the residual. mask_BT is true on real tokens (all are computed, only
    real ones enter the statistics); rng turns the router's noise on; implementation names a
    grouped matmul. Equals `moejax.moe.dense.dense_moe`.
    """
    assert params["experts"]["w_up"].shape[0] == config.num_experts
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    mask_N = None if mask_BT is None else mask_BT.reshape(-1)
    routing = route(params["router"], x_ND, config, mask_N=mask_N, rng=rng)

    # The whole stack goes to the grouped matmul, with no rows for a shared expert: cutting the
    # routed experts out of it would copy them.
    moves = plan(routing.experts_NK, config.num_experts)
    rows_RD = dispatch(x_ND, moves)
    rows_RD = grouped_ffn(
        params["experts"], rows_RD, moves.group_sizes_E, activation, implementation
    )
    y_ND = combine(rows_RD, routing.weights_NK, moves)
    shared_weight = jnp.zeros((), jnp.float32)
    if routing.shared_weight_N is not None:
        shared = {name: stack[0] for name, stack in params["experts"].items()}
        shared_ND = gated_ffn(shared, x_ND, activation)
        y_ND = y_ND + (routing.shared_weight_N[:, None] * shared_ND).astype(y_ND.dtype)
        shared_weight = _mean(routing.shared_weight_N, mask_N)
    stats = MoEStats(
        counts_E=routing.counts_E,
        balance_loss=routing.balance_loss,
        shared_weight=shared_weight,
        dropped=jnp.zeros((), jnp.float32),
    )
    return y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape), stats


def _mean(values_N: jax.Array, mask_N: jax.Array | None) -> jax.Array:
    if mask_N is None:
        return values_N.mean()
    kept_N = mask_N.astype(jnp.float32)
    return (values_N * kept_N).sum() / jnp.maximum(kept_N.sum(), 1.0)
