"""The MoE layer: route, sort tokens by expert, run the experts, put the results back."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from moejax.core.errors import InputError
from moejax.moe.config import MoEConfig
from moejax.moe.dispatch import combine, dispatch, plan
from moejax.moe.experts import ExpertParams, grouped_ffn
from moejax.moe.routing import Routing, abstract_router, init_router, route
from moejax.moe.scores import expert_inputs
from moejax.moe.shapes import init_moe, moe_shapes
from moejax.moe.tuned import first_expert
from moejax.ops.gated_ffn import Activation, gated_ffn

if TYPE_CHECKING:
    from moejax.moe.expert_parallel import Parallel

__all__ = [
    "MoEStats",
    "Trace",
    "abstract_router",
    "add_shared_expert",
    "add_shared_network",
    "init_moe",
    "init_router",
    "layer_stats",
    "moe_layer",
    "moe_shapes",
]

# Up to so many tokens, as in decoding, a block of the grouped matmul is as large as all of them:
# leaving tokens out saves nothing, and slicing experts out of their stack copies weights. Where
# such a share of the experts is expected to be chosen, all are computed in three products. CPU time
# on two busy cores, chosen experts against all: 4 experts, top 3, 576 x 1536: 3.2 and 2.5 ms with 1
# token, 9.3 and 5.4 with 8; 16 experts, top 2, 512 x 1024: 4.7 and 12.3 with 4, 24 and 23 with 20.
FEW_TOKENS, MOST_EXPERTS = 64, 0.7


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """Every token's choice: experts_BTK int32 in the layer's numbering, scores_BTK float32.

    The scores are the router's before any weighting (`moejax.moe.routing.Routing.scores_NK`).
    """

    experts_BTK: jax.Array
    scores_BTK: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEStats:
    """What a layer's router did in one forward pass, all float32, padding excluded.

    counts_E: tokens per expert (a shared expert, index 0, gets them all).
    prob_sums_J: sums over tokens of the routed experts' scores as probabilities.
    balance_loss, z_loss: the layer's losses, already times balance_weight and z_weight.
    shared_weight: mean weight of the shared expert over tokens; 0 without one.
    dropped: share of (token, expert) pairs that were not computed, 0 on one device; under expert
        choice the share of tokens that no expert took.
    trace: each token's experts, where it was asked for.
    """

    counts_E: jax.Array
    prob_sums_J: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array
    shared_weight: jax.Array
    dropped: jax.Array
    trace: Trace | None = None


def moe_layer(
    params: dict[str, Any],
    x_BTD: jax.Array,
    config: MoEConfig,
    *,
    activation: Activation = jax.nn.silu,
    mask_BT: jax.Array | None = None,
    rng: jax.Array | None = None,
    implementation: str | None = None,
    parallel: "Parallel | None" = None,
    trace: bool = False,
) -> tuple[jax.Array, MoEStats]:
    """y = sum_i g_i E_i(x) over the chosen experts, plus the shared expert or network.

    params: the tree of `moe_shapes`; x_BTD is the normed input, y_BTD the layer's output before
    the residual. mask_BT is true on real tokens (all are computed, only real ones enter the
    statistics, and expert choice takes those first); rng turns on what perturbs the router;
    implementation names a grouped matmul, None chooses one, or every expert on every token where
    few tokens use most; parallel runs the layer on a mesh (`moejax.moe.expert_parallel`); trace
    keeps each token's choice in the statistics. Equals `moejax.moe.dense.dense_moe`, unless the
    strategy named there drops. Raises InputError where params, x_BTD and config do not fit.
    """
    _check(params, x_BTD, config)
    if parallel is not None:
        from moejax.moe.expert_parallel import sharded_moe_layer  # it stands on this file

        more: dict[str, Any] = {"activation": activation, "mask_BT": mask_BT, "rng": rng}
        more |= {"implementation": implementation, "trace": trace}
        return sharded_moe_layer(params, x_BTD, config, parallel, **more)
    num_sequences, _, d_model = x_BTD.shape
    x_ND = x_BTD.reshape(-1, d_model)
    mask_N = None if mask_BT is None else mask_BT.reshape(-1)
    routing = route(
        params["router"], x_ND, config, mask_N=mask_N, rng=rng, num_sequences=num_sequences
    )

    x_ND = expert_inputs(x_ND, config, rng)
    # Few tokens that still choose most of the experts: see FEW_TOKENS.
    num_tokens = x_ND.shape[0]
    chosen = 1 - (1 - config.top_k / config.num_experts) ** num_tokens
    all_experts = num_tokens <= FEW_TOKENS and chosen >= MOST_EXPERTS
    every = implementation is None and all_experts and "tuned" not in params["experts"]
    mix = _mix_every_expert if every else functools.partial(_mix_chosen, implementation)
    y_ND = mix(params["experts"], x_ND, routing, activation)
    y_ND = add_shared_network(params, y_ND, x_ND, activation)
    stats = layer_stats(routing, x_BTD.shape[:2] if trace else None)
    return y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape), stats


def _check(params: dict[str, Any], x_BTD: jax.Array, config: MoEConfig) -> None:
    num_experts, d_model, _ = params["experts"]["w_up"].shape
    if num_experts != config.num_experts:
        raise InputError(
            f"the layer's parameters hold {num_experts} experts and config.num_experts is "
            f"{config.num_experts}: give the config that they were made with."
        )
    if x_BTD.ndim != 3 or x_BTD.shape[2] != d_model:
        raise InputError(
            f"moe_layer takes x [B, T, {d_model}] for these parameters, not {list(x_BTD.shape)}."
        )


def add_shared_expert(
    experts: ExpertParams,
    y_ND: jax.Array,
    x_ND: jax.Array,
    routing: Routing,
    activation: Activation,
) -> jax.Array:
    """y plus XFT's shared expert, the first of the stack, by its weight; y if there is none."""
    if routing.shared_weight_N is None:
        return y_ND
    shared_ND = gated_ffn(first_expert(experts), x_ND, activation)
    return y_ND + (routing.shared_weight_N[:, None] * shared_ND).astype(y_ND.dtype)


def add_shared_network(
    params: dict[str, Any], y_ND: jax.Array, x_ND: jax.Array, activation: Activation
) -> jax.Array:
    """y plus the network beside the experts, times its gate if it has one; y if there is none."""
    if "shared" not in params:
        return y_ND
    shared_ND = gated_ffn(params["shared"], x_ND, activation)
    if "w_mix" in params["shared"]:
        w_mix = params["shared"]["w_mix"].astype(x_ND.dtype)
        mix_N1 = jnp.matmul(x_ND, w_mix, preferred_element_type=jnp.float32)
        shared_ND = (jax.nn.sigmoid(mix_N1) * shared_ND).astype(shared_ND.dtype)
    return y_ND + shared_ND


def layer_stats(routing: Routing, shape_BT: tuple[int, ...] | None = None) -> MoEStats:
    """What of the routing the caller keeps, with a trace of tokens [B, T] if their shape is given.

    Raises InputError for a trace of expert choice, where tokens have differing numbers of experts.
    """
    trace = None
    if shape_BT is not None:
        if routing.token_N is not None:
            raise InputError("expert choice has no experts per token: its routing is not traced")
        shape = (*shape_BT, routing.experts_NK.shape[1])
        trace = Trace(routing.experts_NK.reshape(shape), routing.scores_NK.reshape(shape))
    return MoEStats(
        counts_E=routing.counts_E,
        prob_sums_J=routing.prob_sums_J,
        balance_loss=routing.balance_loss,
        z_loss=routing.z_loss,
        shared_weight=routing.shared_weight,
        dropped=routing.dropped,
        trace=trace,
    )


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
    taken_ND = x_ND if routing.token_N is None else x_ND[routing.token_N]
    rows_RD = dispatch(taken_ND, moves)
    rows_RD = grouped_ffn(experts, rows_RD, moves.group_sizes_E, activation, implementation)
    y_ND = combine(rows_RD, routing.weights_NK, moves)
    if routing.token_N is not None:  # rows are pairs, and a token has any number of them
        sums_ND = jax.ops.segment_sum(y_ND.astype(jnp.float32), routing.token_N, x_ND.shape[0])
        y_ND = sums_ND.astype(y_ND.dtype)
    return add_shared_expert(experts, y_ND, x_ND, routing, activation)


def _mix_every_expert(
    experts: ExpertParams, x_ND: jax.Array, routing: Routing, activation: Activation
) -> jax.Array:
    """Computes all experts on all tokens in three batched products, which read each weight once."""
    num_tokens, num_experts = x_ND.shape[0], experts["w_up"].shape[0]
    stacks = {name: w[:, None] if name.startswith("b_") else w for name, w in experts.items()}
    x_END = jnp.broadcast_to(x_ND, (num_experts, *x_ND.shape))
    y_END = gated_ffn(stacks, x_END, activation)
    weights_NE = routing.dense_weights(num_tokens, num_experts)
    return jnp.einsum("end,ne->nd", y_END, weights_NE).astype(x_ND.dtype)
