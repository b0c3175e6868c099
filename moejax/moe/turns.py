"""Which pairs of a token and an expert travel in which exchange, and where they lie in its buffer.

The tokens of a device are cut into parts. A pair travels in the turn of its part, one of the first
T, if there is room for it, and in a later turn with what all parts leave over. A turn has S rows
from each device to each of the P expert shards. All index arithmetic is here;
`moejax.moe.chunked` moves the rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queues:
    """Pairs of one device in the order in which they travel, R of them, to P receivers.

    There is a queue for each of T parts, and one more for what those leave over: Q = T + 1.

    order_2R: the pair of each place: [0] part by part, each sorted by expert and hence by receiver;
        [1] those left over sorted by expert, then the others.
    rank_2R: of a pair, its position in that queue among those for its receiver; [1] -1 for others.
    receiver_R: of a pair.
    starts_QP: place of a queue's first pair for each receiver.
    received_QPE: how many pairs each sender's queue has for each of this device's E experts.
    """

    order_2R: jax.Array
    rank_2R: jax.Array
    receiver_R: jax.Array
    starts_QP: jax.Array
    received_QPE: jax.Array

    @property
    def num_parts(self) -> int:
        """T, the turns that take place whatever the load."""
        return self.starts_QP.shape[0] - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turn:
    """One exchange as its receiver has it: P * S slots, and the rows sorted by expert.

    sizes_E: rows for each expert.
    slot_of_row_S: the slot that a sorted row comes from; row_of_slot_S: the inverse. Both hold any
        index in range beyond the rows there are.
    """

    sizes_E: jax.Array
    slot_of_row_S: jax.Array
    row_of_slot_S: jax.Array


def count(index_R: jax.Array, length: int) -> jax.Array:
    """How often each of 0 .. length - 1 occurs. Compares: a TPU adds up scattered ones slowly."""
    return jnp.sum(index_R[:, None] == jnp.arange(length), axis=0, dtype=jnp.int32)


def queues(
    experts_NK: jax.Array,
    num_experts: int,
    shards: int,
    part_tokens: int,
    slots: int,
    swap: Callable[[jax.Array], jax.Array],
) -> Queues:
    """Sorts the pairs of a device, and hears from every sender how many are coming.

    part_tokens: tokens of a part; of the last one no more. slots: S of a turn. swap: sends row p of
    an array to shard p.
    """
    num_tokens, top_k = experts_NK.shape
    parts, num_local = -(-num_tokens // part_tokens), num_experts // shards
    expert_R = experts_NK.reshape(-1)
    part_R = jnp.arange(expert_R.size) // (part_tokens * top_k)
    receiver_R = expert_R // num_local
    room = parts * part_tokens * top_k - expert_R.size
    of_parts = jnp.pad(expert_R, (0, room), constant_values=-1).reshape(parts, -1)
    sizes_TPE = jax.vmap(lambda e: count(e, num_experts))(of_parts).reshape(parts, shards, -1)

    order_R = jnp.argsort(part_R * num_experts + expert_R, stable=True)
    starts_TP = _before(sizes_TPE.sum(axis=2))
    rank_R = jnp.argsort(order_R) - starts_TP.reshape(-1)[part_R * shards + receiver_R]

    left_R = rank_R >= slots
    rest_R = jnp.argsort(jnp.where(left_R, expert_R, num_experts), stable=True)
    rest_P = _before(count(jnp.where(left_R, receiver_R, shards), shards))
    rank_rest_R = jnp.where(left_R, jnp.argsort(rest_R) - rest_P[receiver_R], -1)

    received_TPE = jnp.swapaxes(swap(jnp.swapaxes(sizes_TPE, 0, 1)), 0, 1)
    left_PE = jnp.sum(received_TPE - _within(received_TPE, 0, slots), axis=0)
    return Queues(
        order_2R=jnp.stack([order_R, rest_R]),
        rank_2R=jnp.stack([rank_R, rank_rest_R]),
        receiver_R=receiver_R,
        starts_QP=jnp.concatenate([starts_TP, rest_P[None]]),
        received_QPE=jnp.concatenate([received_TPE, left_PE[None]]),
    )


def _before(sizes: jax.Array) -> jax.Array:
    """Of pieces that lie one after another, rows after rows, where each begins."""
    ends = jnp.cumsum(sizes.reshape(-1)).reshape(sizes.shape)
    return ends - sizes


def _place(pairs: Queues, number: jax.Array | int, slots: int) -> tuple[Any, Any, Any]:
    """A turn's queue, the row of order_2R and rank_2R that it is in, and its first rank."""
    past = jnp.asarray(number, jnp.int32) - pairs.num_parts
    row = (past >= 0).astype(jnp.int32)
    return jnp.minimum(past, 0) + pairs.num_parts, row, jnp.maximum(past, 0) * slots


def pairs_sent(pairs: Queues, number: jax.Array | int, slots: int) -> jax.Array:
    """The pair of each of the P * S slots that turn `number` sends; any where none is."""
    queue, row, first = _place(pairs, number, slots)
    place_PS = pairs.starts_QP[queue][:, None] + first + jnp.arange(slots)
    last = pairs.order_2R.shape[1] - 1
    return pairs.order_2R[row, jnp.minimum(place_PS.reshape(-1), last)]


def slots_of(pairs: Queues, number: jax.Array | int, slots: int, begin: Any, size: int):
    """The slot in which turn `number` sends each of `size` pairs from `begin` on, -1 for none."""
    queue, row, first = _place(pairs, number, slots)
    rank = jax.lax.dynamic_slice(pairs.rank_2R, (row, begin), (1, size))[0] - first
    receiver = jax.lax.dynamic_slice(pairs.receiver_R, (begin,), (size,))
    return jnp.where((rank >= 0) & (rank < slots), receiver * slots + rank, -1)


def turn(pairs: Queues, number: jax.Array | int, slots: int) -> Turn:
    """What turn `number` brings."""
    queue, _, first = _place(pairs, number, slots)
    counts_PE = _within(pairs.received_QPE[queue], first, slots)
    return Turn(counts_PE.sum(axis=0), *_places(counts_PE, slots))


def _within(sizes_E: jax.Array, first: jax.Array | int, slots: int) -> jax.Array:
    """Of groups that lie one after another along E, the rows first .. first + slots - 1."""
    ends_E = jnp.cumsum(sizes_E, axis=-1)
    low_E = jnp.maximum(ends_E - sizes_E, first)
    return jnp.maximum(jnp.minimum(ends_E, first + slots) - low_E, 0)


def _places(counts_PE: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """slot_of_row_S and row_of_slot_S: each sender's S slots are sorted by expert already."""
    shards, num_local = counts_PE.shape
    total = shards * slots
    sizes_E = counts_PE.sum(axis=0)
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    earlier_PE = jnp.cumsum(counts_PE, axis=0) - counts_PE  # rows of that expert before sender p's
    ends_PE = jnp.cumsum(counts_PE, axis=1)
    # Slot s of sender p with expert e is row base[p, e] + s.
    base_PE = starts_E + earlier_PE - (ends_PE - counts_PE)

    row_S = jnp.arange(total)
    ends_EP = jnp.cumsum(counts_PE.T.reshape(-1))
    which_S = jnp.sum(row_S[:, None] >= ends_EP, axis=1, dtype=jnp.int32)
    which_S = jnp.minimum(which_S, shards * num_local - 1)
    expert_S, sender_S = which_S // shards, which_S % shards
    slot_of_row_S = sender_S * slots + row_S - base_PE[sender_S, expert_S]

    slot_S = jnp.arange(slots)
    expert_PS = jnp.sum(slot_S[:, None] >= ends_PE[:, None, :], axis=2, dtype=jnp.int32)
    expert_PS = jnp.minimum(expert_PS, num_local - 1)
    row_of_slot_PS = jnp.take_along_axis(base_PE, expert_PS, axis=1) + slot_S
    clip = lambda index: jnp.clip(index, 0, total - 1)  # noqa: E731
    return clip(slot_of_row_S), clip(row_of_slot_PS.reshape(-1))
