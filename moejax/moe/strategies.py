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
from moejax.moe.dispatch import combine, dispatch, plan
from moejax.moe.experts import ExpertParams, grouped_ffn
from moejax.ops.gated_ffn import Activation

AXIS = "expert"


@dataclasses.dataclass(frozen=True)
class Context:
    """Experts and shards in all, the buffer over the balanced load, what computes the experts."""

    num_experts: int
    shards: int
    factor: float
    activation: Activation
    implementation: str | None


Strategy = Callable[
    [Context, jax.Array, jax.Array, jax.Array, ExpertParams], tuple[jax.Array, jax.Array]
]


def local(context, x_ND, experts_NK, weights_NK, experts):
    """No exchange: one expert shard, which holds them all."""
    moves = plan(experts_NK, context.num_experts)
    rows_RD = _ffn(context, experts, dispatch(x_ND, moves), moves.group_sizes_E)
    return combine(rows_RD, weights_NK, moves).astype(jnp.float32), jnp.zeros((), jnp.float32)


def all_gather(context, x_ND, experts_NK, weights_NK, experts):
    """Every shard sees the tokens of all P and adds its experts' share: P N K rows in memory."""
    x_ND, experts_NK, weights_NK = (
        jax.lax.all_gather(a, AXIS, tiled=True) for a in (x_ND, experts_NK, weights_NK)
    )
    num_local = context.num_experts // context.shards
    mine_NK = experts_NK - jax.lax.axis_index(AXIS) * num_local
    # What is another shard's comes last, in a group that no expert has.
    mine_NK = jnp.where((mine_NK >= 0) & (mine_NK < num_local), mine_NK, num_local)
    moves = plan(mine_NK, num_local + 1)
    rows_RD = _ffn(context, experts, dispatch(x_ND, moves), moves.group_sizes_E[:num_local])
    weights_NK = jnp.where(mine_NK < num_local, weights_NK, 0.0)
    y_ND = combine(rows_RD, weights_NK, moves).astype(jnp.float32)
    y_ND = jax.lax.psum_scatter(y_ND, AXIS, tiled=True)
    return y_ND, jnp.zeros((), jnp.float32)


def capacity(context, x_ND, experts_NK, weights_NK, experts):
    """A padded all_to_all of factor x the balanced load; what a pair of devices has more, drops.

    The limit is per sender and receiving device, not per expert: rows that a neighbouring expert
    leaves free are used. Drops the rows of the receiver's higher experts first.
    """
    exchange, moves = _schedule(context, experts_NK)
    y_ND = chunked.first_rounds(exchange, x_ND, weights_NK, experts, moves)
    room = chunked.FIRST_ROUNDS * exchange.slots
    lost = jnp.maximum(moves.sizes_P - room, 0).sum().astype(jnp.float32)
    return y_ND, jax.lax.pmean(lost / experts_NK.size, TOKEN_AXES)


def chunked_exact(context, x_ND, experts_NK, weights_NK, experts):
    """Exact, in rounds over that buffer until nothing is left; see `moejax.moe.chunked`."""
    exchange, moves = _schedule(context, experts_NK)
    y_ND = chunked.all_rounds(exchange, x_ND, weights_NK, experts, moves)
    return y_ND, jnp.zeros((), jnp.float32)


BY_NAME: dict[str, Strategy] = {
    "local": local,
    "all_gather": all_gather,
    "capacity": capacity,
    "chunked": chunked_exact,
}


def _ffn(context: Context, experts: ExpertParams, rows_RD, sizes_E) -> jax.Array:
    return grouped_ffn(experts, rows_RD, sizes_E, context.activation, context.implementation)


def _schedule(context: Context, experts_NK) -> tuple[chunked.Exchange, chunked.Schedule]:
    exchange = chunked.Exchange(
        axis=AXIS,
        shards=context.shards,
        slots=chunked.slots_per_round(experts_NK.size, context.shards, context.factor),
        activation=context.activation,
        implementation=context.implementation,
    )
    return exchange, chunked.schedule(experts_NK, context.num_experts, exchange, TOKEN_AXES)
