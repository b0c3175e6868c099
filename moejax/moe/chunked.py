"""Tokens to the devices of their experts and back in rounds over a fixed buffer.

A device sends to each of P expert shards up to `slots` rows per round (a padded all_to_all);
round t carries the rows t * slots .. (t + 1) * slots - 1 that it has for that shard. The rounds add
up, so the backward pass replays them one by one and keeps only x, the weights and the routing.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from moejax.moe.experts import ExpertParams, grouped_ffn
from moejax.ops.gated_ffn import Activation

# The two rounds that always run together hold `factor` times the balanced load. They do not depend
# on each other, so one's exchange may overlap the other's matmuls.
FIRST_ROUNDS = 2
# Names the loops over further rounds in a compiled program: of a balanced load they run none.
UNBALANCED = "unbalanced_rounds"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How rows travel: the experts' mesh axis, rows per round and receiver, what computes."""

    axis: str
    shards: int
    slots: int
    activation: Activation
    implementation: str | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The (token, choice) pairs by receiver; R = N * K of them, P receivers.

    order_R: pair of sorted row r.  expert_R: its expert, within the receiver.  starts_P, sizes_P:
    a receiver's first row and number of rows.  receiver_R, rank_R: of a pair (unsorted), and its
    position among that receiver's.  num_rounds: enough for everyone; equal on all devices.
    """

    order_R: jax.Array
    expert_R: jax.Array
    starts_P: jax.Array
    sizes_P: jax.Array
    receiver_R: jax.Array
    rank_R: jax.Array
    num_rounds: jax.Array


def slots_per_round(num_pairs: int, shards: int, factor: float) -> int:
    """Rows to one receiver in one round, so that FIRST_ROUNDS hold factor x the balanced load."""
    return max(1, math.ceil(factor * num_pairs / (shards * FIRST_ROUNDS)))


def schedule(
    experts_NK: jax.Array, num_experts: int, exchange: Exchange, axis_names: tuple[str, ...]
) -> Schedule:
    """Sorts the pairs by expert, hence by receiver, and counts the rounds all devices need."""
    experts_R = experts_NK.reshape(-1)
    per_shard = num_experts // exchange.shards
    order_R = jnp.argsort(experts_R, stable=True)
    receiver_R = experts_R // per_shard
    sizes_P = jnp.bincount(receiver_R, length=exchange.shards).astype(jnp.int32)
    starts_P = jnp.cumsum(sizes_P) - sizes_P
    most = jax.lax.pmax(jnp.max(sizes_P), axis_names)
    return Schedule(
        order_R=order_R,
        expert_R=(experts_R % per_shard)[order_R],
        starts_P=starts_P,
        sizes_P=sizes_P,
        receiver_R=receiver_R,
        rank_R=jnp.argsort(order_R) - starts_P[receiver_R],
        num_rounds=-(-most // exchange.slots),
    )


def one_round(
    exchange: Exchange,
    x_ND: jax.Array,
    weights_NK: jax.Array,
    experts: ExpertParams,
    moves: Schedule,
    turn: jax.Array | int,
) -> jax.Array:
    """What round `turn` adds to y: float32 [N, D]."""
    shards, slots = exchange.shards, exchange.slots
    rank_S = turn * slots + jnp.arange(slots)
    sorted_PS = moves.starts_P[:, None] + rank_S
    used_S = (rank_S < moves.sizes_P[:, None]).reshape(-1)
    sorted_S = jnp.where(used_S, sorted_PS.reshape(-1), 0)
    pair_S = jnp.where(used_S, moves.order_R[sorted_S], -1)
    here_R = moves.rank_R // slots == turn
    slot_R = jnp.where(here_R, moves.receiver_R * slots + moves.rank_R % slots, -1)

    num_local = experts["w_up"].shape[0]
    send_SD = _to_slots(x_ND, pair_S, slot_R)
    expert_S = jnp.where(used_S, moves.expert_R[sorted_S], num_local)
    got_SD = _swap(send_SD, exchange)
    expert_S = _swap(expert_S, exchange)

    order_S = jnp.argsort(expert_S, stable=True)
    place_S = jnp.argsort(order_S)
    sizes_E = jnp.bincount(expert_S, length=num_local + 1)[:num_local].astype(jnp.int32)
    rows_SD = _move(got_SD, order_S, place_S)
    rows_SD = grouped_ffn(experts, rows_SD, sizes_E, exchange.activation, exchange.implementation)
    back_SD = _swap(_move(rows_SD, place_S, order_S), exchange)
    assert back_SD.shape[0] == shards * slots
    pairs_RD = _move(back_SD, slot_R, pair_S)
    pairs_NKD = pairs_RD.reshape(*weights_NK.shape, -1)
    return jnp.einsum("nkd,nk->nd", pairs_NKD, weights_NK, preferred_element_type=jnp.float32)


def first_rounds(
    exchange: Exchange, x_ND: jax.Array, weights_NK: jax.Array, experts: Any, moves: Schedule
) -> jax.Array:
    """The rounds that run whatever the load: all of "capacity", the beginning of "chunked"."""
    parts = (one_round(exchange, x_ND, weights_NK, experts, moves, t) for t in range(FIRST_ROUNDS))
    return functools.reduce(jnp.add, parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def all_rounds(
    exchange: Exchange, x_ND: jax.Array, weights_NK: jax.Array, experts: Any, moves: Schedule
) -> jax.Array:
    """y of every pair, whatever the imbalance, in the memory of one round: float32 [N, D].

    Gradients are summed over rounds in the dtype of what they belong to (x: float32).
    """

    def step(carry):
        turn, y_ND = carry
        return turn + 1, y_ND + one_round(exchange, x_ND, weights_NK, experts, moves, turn)

    y_ND = first_rounds(exchange, x_ND, weights_NK, experts, moves)
    start = (jnp.asarray(FIRST_ROUNDS, jnp.int32), y_ND)
    with jax.named_scope(UNBALANCED):
        return jax.lax.while_loop(lambda carry: carry[0] < moves.num_rounds, step, start)[1]


def _all_rounds_forward(exchange, x_ND, weights_NK, experts, moves):
    saved = (x_ND, weights_NK, experts, moves)
    return all_rounds(exchange, *saved), saved


def _all_rounds_backward(exchange, saved, d_y_ND):
    x_ND, weights_NK, experts, moves = saved

    def replay(function):
        _, pull = jax.vjp(function, x_ND, weights_NK, experts)
        d_x, d_weights, d_experts = pull(d_y_ND)
        return d_x.astype(jnp.float32), d_weights, d_experts

    def step(carry):
        turn, total = carry
        more = replay(lambda x, w, e: one_round(exchange, x, w, e, moves, turn))
        return turn + 1, jax.tree.map(jnp.add, total, more)

    first = replay(lambda x, w, e: first_rounds(exchange, x, w, e, moves))
    start = (jnp.asarray(FIRST_ROUNDS, jnp.int32), first)
    with jax.named_scope(UNBALANCED):
        _, total = jax.lax.while_loop(lambda carry: carry[0] < moves.num_rounds, step, start)
    return total[0].astype(x_ND.dtype), total[1], total[2], None


all_rounds.defvjp(_all_rounds_forward, _all_rounds_backward)


def _swap(rows_S: jax.Array, exchange: Exchange) -> jax.Array:
    """Block p of each device to device p; its own inverse."""
    return jax.lax.all_to_all(rows_S, exchange.axis, 0, 0, tiled=True)


def _masked(rows_D: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.where(index[:, None] >= 0, rows_D[jnp.maximum(index, 0)], 0)


@jax.custom_vjp
def _move(rows_AD: jax.Array, from_B: jax.Array, to_A: jax.Array) -> jax.Array:
    """Row b is rows[from_B[b]], zero where that is -1; to_A is the inverse, for the gradient."""
    return _masked(rows_AD, from_B)


_move.defvjp(
    lambda rows_AD, from_B, to_A: (_move(rows_AD, from_B, to_A), to_A),
    lambda to_A, d_BD: (_masked(d_BD, to_A), None, None),
)


@jax.custom_vjp
def _to_slots(x_ND: jax.Array, pair_S: jax.Array, slot_R: jax.Array) -> jax.Array:
    """The token of each slot's pair, zero where the slot is empty."""
    num_choices = slot_R.shape[0] // x_ND.shape[0]
    return _masked(x_ND, jnp.where(pair_S >= 0, pair_S // num_choices, -1))


def _to_slots_backward(saved, d_SD):
    num_tokens, slot_R = saved
    d_NKD = _masked(d_SD, slot_R).reshape(num_tokens, -1, d_SD.shape[1])
    return d_NKD.sum(axis=1, dtype=jnp.float32).astype(d_SD.dtype), None, None


_to_slots.defvjp(
    lambda x_ND, pair_S, slot_R: (_to_slots(x_ND, pair_S, slot_R), (x_ND.shape[0], slot_R)),
    _to_slots_backward,
)
