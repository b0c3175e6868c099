"""The ways tokens travel to their experts: functions of equal signature, inside the shard_map.

strategy(context, x_ND, experts_NK, weights_NK, experts) -> (float32 [N, D], dropped share). experts
holds this device's E / P experts; experts_NK counts over all E.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.core.mesh import TOKEN_AXES
from moejax.moe import chunked
from moejax.moe.dispatch import combine, dispatch, plan, unsort
from moejax.moe.experts import ExpertParams, grouped_ffn
from moejax.moe.ragged import exclusive_sums, ragged_all_to_all
from moejax.ops.gated_ffn import Activation
from moejax.ops.kept import ROUTING, keep

AXIS = "expert"


@dataclasses.dataclass(frozen=True)
class Context:
    """Experts and shards in all, the buffer over the balanced load, what computes the experts.

    keep: as in `moejax.moe.expert_parallel.Parallel`.
    """

    num_experts: int
    shards: int
    factor: float
    activation: Activation
    implementation: str | None
    keep: bool = False


Strategy = Callable[
    [Context, jax.Array, jax.Array, jax.Array, ExpertParams], tuple[jax.Array, jax.Array]
]


def local(context, x_ND, experts_NK, weights_NK, experts):
    """No exchange: one expert shard, which holds them all."""
    moves = plan(experts_NK, context.num_experts)
    rows_RD = _ffn(context, experts, dispatch(x_ND, moves), moves.group_sizes_E)
    return combine(rows_RD, weights_NK, moves).astype(jnp.float32), jnp.zeros((), jnp.float32)


def all_gather(context, x_ND, experts_NK, weights_NK, experts):
    """Every shard sees the tokens of all P and adds its experts' share: P N min(K, E / P) rows."""
    x_ND, experts_NK, weights_NK = (
        jax.lax.all_gather(a, AXIS, tiled=True) for a in (x_ND, experts_NK, weights_NK)
    )
    num_local = context.num_experts // context.shards
    mine_NK = experts_NK - jax.lax.axis_index(AXIS) * num_local
    mine_NM, weights_NM = _of_range(mine_NK, weights_NK, num_local)
    moves = plan(mine_NM, num_local + 1)
    rows_RD = _ffn(context, experts, dispatch(x_ND, moves), moves.group_sizes_E[:num_local])
    y_ND = combine(rows_RD, weights_NM, moves).astype(jnp.float32)
    y_ND = jax.lax.psum_scatter(y_ND, AXIS, tiled=True)
    return y_ND, jnp.zeros((), jnp.float32)


def _of_range(
    experts_NK: jax.Array, weights_NK: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array]:
    """A token's choices among experts 0 .. num_experts - 1, [N, M] with M = min(K, num_experts).

    Where it has fewer: weight 0 and expert num_experts, which there is none of.
    """
    here_NK = (experts_NK >= 0) & (experts_NK < num_experts)
    experts_NK = jnp.where(here_NK, experts_NK, num_experts)
    weights_NK = jnp.where(here_NK, weights_NK, 0.0)
    if experts_NK.shape[1] <= num_experts:
        return experts_NK, weights_NK
    nth_NK = jnp.where(here_NK, jnp.cumsum(here_NK, axis=1), 0)
    which_NMK = nth_NK[:, None] == jnp.arange(1, num_experts + 1)[:, None]
    experts_NM = jnp.min(jnp.where(which_NMK, experts_NK[:, None], num_experts), axis=-1)
    return experts_NM, jnp.sum(jnp.where(which_NMK, weights_NK[:, None], 0.0), axis=-1)


def capacity(context, x_ND, experts_NK, weights_NK, experts):
    """A padded all_to_all of factor x the balanced load; what a pair of devices has more, drops.

    The limit is per sender and receiving device, not per expert: rows that a neighbouring expert
    leaves free are used. Drops the rows of the receiver's higher experts first.
    """
    exchange, moves = _schedule(context, experts_NK, exact=False)
    y_ND = chunked.all_exchanges(exchange, x_ND, weights_NK, experts, moves)
    lost = moves.num_left.astype(jnp.float32)
    return y_ND, jax.lax.pmean(lost / experts_NK.size, TOKEN_AXES)


def ragged(context, x_ND, experts_NK, weights_NK, experts):
    """Exact, in one ragged_all_to_all each way, into a buffer for the worst case.

    A shard gets at most min(K, its experts) rows of a token, so the buffer has P N times that.
    """
    shards = context.shards
    num_local = context.num_experts // shards
    moves = plan(experts_NK, context.num_experts)  # by expert, hence by receiver
    sizes_PE = moves.group_sizes_E.reshape(shards, num_local)
    received_PE = jax.lax.all_to_all(sizes_PE, AXIS, 0, 0, tiled=True)
    sent_P, received_P = sizes_PE.sum(axis=1), received_PE.sum(axis=1)
    starts_P, places_P = exclusive_sums(sent_P), exclusive_sums(received_P)
    # A slice's place is its sender's to say: each receiver tells the senders where theirs go.
    place_there_P = jax.lax.all_to_all(places_P, AXIS, 0, 0, tiled=True)
    start_there_P = jax.lax.all_to_all(starts_P, AXIS, 0, 0, tiled=True)
    num_tokens, top_k = experts_NK.shape
    # Under expert choice a row is a pair, and any number of them may go to one shard.
    room = shards * num_tokens * min(top_k, num_local)
    rows_RD = dispatch(x_ND, moves)
    buffer_MD = jnp.zeros((room, x_ND.shape[1]), x_ND.dtype)
    there = (starts_P, sent_P, place_there_P, received_P)
    got_MD = ragged_all_to_all(rows_RD, buffer_MD, *there, axis_name=AXIS)

    # Each sender's rows are sorted by expert; here all of them are.
    which_M = jnp.searchsorted(jnp.cumsum(received_PE.reshape(-1)), jnp.arange(room), side="right")
    expert_M = jnp.where(which_M < received_PE.size, which_M % num_local, num_local)
    by_expert = plan(expert_M[:, None], num_local + 1)
    rows_MD = _ffn(context, experts, dispatch(got_MD, by_expert), by_expert.group_sizes_E[:-1])
    rows_MD = unsort(rows_MD, by_expert)
    back = (places_P, received_P, start_there_P, sent_P)
    rows_RD = ragged_all_to_all(rows_MD, jnp.zeros_like(rows_RD), *back, axis_name=AXIS)
    return combine(rows_RD, weights_NK, moves).astype(jnp.float32), jnp.zeros((), jnp.float32)


def chunked_exact(context, x_ND, experts_NK, weights_NK, experts):
    """Exact, in rounds over that buffer until nothing is left; see `moejax.moe.chunked`."""
    exchange, moves = _schedule(context, experts_NK, exact=True)
    y_ND = chunked.all_exchanges(exchange, x_ND, weights_NK, experts, moves)
    return y_ND, jnp.zeros((), jnp.float32)


BY_NAME: dict[str, Strategy] = {
    "local": local,
    "all_gather": all_gather,
    "capacity": capacity,
    "ragged": ragged,
    "chunked": chunked_exact,
}


def _ffn(context: Context, experts: ExpertParams, rows_RD, sizes_E) -> jax.Array:
    return grouped_ffn(experts, rows_RD, sizes_E, context.activation, context.implementation)


def _schedule(
    context: Context, experts_NK, exact: bool
) -> tuple[chunked.Exchange, chunked.Schedule]:
    num_tokens, top_k = experts_NK.shape
    exchange = chunked.Exchange(
        axis=AXIS,
        shards=context.shards,
        slots=chunked.slots_per_exchange(num_tokens, top_k, context.shards, context.factor),
        exact=exact,
        activation=context.activation,
        implementation=context.implementation,
        keep=context.keep,
    )
    moves = chunked.schedule(experts_NK, context.num_experts, exchange, TOKEN_AXES)
    return exchange, keep(moves, ROUTING)
