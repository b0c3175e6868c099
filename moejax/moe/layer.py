"""The MoE layer: route, sort tokens by expert, run the experts, put the results back."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from moejax.moe.config import MoEConfig
from moejax.moe.dispatch import combine, dispatch, plan
from moejax.moe.experts import ExpertParams, grouped_ffn
from moejax.moe.routing import Routing, abstract_router, init_router, route
from moejax.ops.gated_ffn import Activation, gated_ffn

__all__ = ["MoEStats", "abstract_router", "init_router", "moe_layer"]

# Up to so many tokens, as in decoding, a block of the grouped matmul is as large as all of them:
# leaving tokens out saves nothing, and slicing experts out of their stack copies weights. Measured
# on two cores (4 experts, top 3, 576 x 1536): 6 times as fast with 1 token, twice with 30.
FEW_TOKENS = 64


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
    grouped matmul, None chooses one, or every expert on every token where few tokens use most.
    Equals `moejax.moe.dense.dense_moe`.
    """
    assert params["experts"]["w_up"].shape[0] == config.num_experts
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    mask_N = None if mask_BT is None else mask_BT.reshape(-1)
    routing = route(params["router"], x_ND, config, mask_N=mask_N, rng=rng)

    # Few tokens that still need most of the experts: see FEW_TOKENS.
    num_tokens = x_ND.shape[0]
    needed = min(num_tokens * config.top_k, config.num_experts)
    all_experts = num_tokens <= FEW_TOKENS and 2 * needed >= config.num_experts
    every = implementation is None and all_experts
    mix = _mix_every_expert if every else functools.partial(_mix_chosen, implementation)
    y_ND = mix(params["experts"], x_ND, routing, activation)
    shared_weight = jnp.zeros((), jnp.float32)
    if routing.shared_weight_N is not None:
        shared_weight = _mean(routing.shared_weight_N, mask_N)
    stats = MoEStats(
        counts_E=routing.counts_E,
        balance_loss=routing.balance_loss,
        shared_weight=shared_weight,
        dropped=jnp.zeros((), jnp.float32),
    )
    return y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape), stats


def _mix_chosen(
    implementation: str | None,
    experts: ExpertParams,
    x_ND: jax.Array,
    routing: Routing,
    activation: Activation,
) -> jax.Array:
    """Sorts the tokens by expert, so that each is computed by its own experts only."""
    # The whole stack goes to the grouped matmul, with no rows for a shared expert: cutting the
    # routed experts out of it would copy them.
    moves = plan(routing.experts_NK, experts["w_up"].shape[0])
    rows_RD = dispatch(x_ND, moves)
    rows_RD = grouped_ffn(experts, rows_RD, moves.group_sizes_E, activation, implementation)
    y_ND = combine(rows_RD, routing.weights_NK, moves)
    if routing.shared_weight_N is None:
        return y_ND
    shared = {name: stack[0] for name, stack in experts.items()}
    shared_ND = gated_ffn(shared, x_ND, activation)
    return y_ND + (routing.shared_weight_N[:, None] * shared_ND).astype(y_ND.dtype)


def _mix_every_expert(
    experts: ExpertParams, x_ND: jax.Array, routing: Routing, activation: Activation
) -> jax.Array:
    """Computes all experts on all tokens in three batched products, which read each weight once."""
    num_experts = experts["w_up"].shape[0]
    stacks = {name: w[:, None] if name.startswith("b_") else w for name, w in experts.items()}
    x_END = jnp.broadcast_to(x_ND, (num_experts, *x_ND.shape))
    y_END = gated_ffn(stacks, x_END, activation)
    chosen_NKE = jax.nn.one_hot(routing.experts_NK, num_experts)
    weights_NE = jnp.einsum("nke,nk->ne", chosen_NKE, routing.weights_NK)
    if routing.shared_weight_N is not None:
        weights_NE = weights_NE.at[:, 0].set(routing.shared_weight_N)
    return jnp.einsum("end,ne->nd", y_END, weights_NE).astype(x_ND.dtype)


def _mean(values_N: jax.Array, mask_N: jax.Array | None) -> jax.Array:
    if mask_N is None:
        return values_N.mean()
    kept_N = mask_N.astype(jnp.float32)
    return (values_N * kept_N).sum() / jnp.maximum(kept_N.sum(), 1.0)
