"""Which rows travel when: the (token, choice) pairs of a device cut into exchanges of fixed size.

An exchange carries up to S rows from each device to each of the P expert shards. All index
arithmetic is here; `moejax.moe.chunked` moves the rows.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """Pairs of one device in the order in which they travel, R of them, to P receivers.

    order_R: pair of sorted row r, by expert and hence by receiver; pairs that stay come last.
    receiver_R, rank_R: of a pair, and its position among that receiver's; -1 for those that stay.
    starts_P: a receiver's first sorted row.
    received_PE: rows that each sender has for each of this device's E experts.
    """

    order_R: jax.Array
    receiver_R: jax.Array
    rank_R: jax.Array
    starts_P: jax.Array
    received_PE: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turn:
    """One exchange: where a sender reads its slots, and where a receiver puts them.

    pair_S: pair of each of the P * S slots that are sent; any where none is.
    slot_R: slot of each pair, -1 where it travels in another turn.
    sizes_E: rows received for each expert.
    slot_of_row_S: which received slot the rows sorted by expert come from; row_of_slot_S: the
        inverse. Both hold any index in range beyond the rows there are.
    """

    pair_S: jax.Array
    slot_R: jax.Array
    sizes_E: jax.Array
    slot_of_row_S: jax.Array
    row_of_slot_S: jax.Array


def count(index_R: jax.Array, length: int) -> jax.Array:
    """How often each of 0 .. length - 1 occurs. Compares: a TPU adds up scattered ones slowly."""
    return jnp.sum(index_R[:, None] == jnp.arange(length), axis=0, dtype=jnp.int32)


def part(
    experts_R: jax.Array, travels_R: jax.Array | None, received_PE: jax.Array, num_experts: int
) -> Part:
    """Sorts pairs by expert; those that do not travel (None: all do) have no rank."""
    shards = received_PE.shape[0]
    receiver_R = experts_R // (num_experts // shards)
    if travels_R is not None:
        experts_R = jnp.where(travels_R, experts_R, num_experts)
        receiver_R = jnp.where(travels_R, receiver_R, shards)
    order_R = jnp.argsort(experts_R, stable=True)
    sizes_P = count(receiver_R, shards)
    starts_P = jnp.cumsum(sizes_P) - sizes_P
    receiver_R = jnp.minimum(receiver_R, shards - 1)
    rank_R = jnp.argsort(order_R) - starts_P[receiver_R]
    if travels_R is not None:
        rank_R = jnp.where(travels_R, rank_R, -1)
    return Part(order_R, receiver_R, rank_R, starts_P, received_PE)


def left_over(received_PE: jax.Array, slots: int) -> jax.Array:
    """Rows per sender and expert that a first turn of S slots leaves, the last experts' first."""
    return received_PE - _within(received_PE, 0, slots)


def turn(pairs: Part, number: jax.Array | int, slots: int) -> Turn:
    """Exchange `number` of a part: its ranks number * S .. (number + 1) * S - 1."""
    shards, num_pairs = pairs.starts_P.shape[0], pairs.order_R.shape[0]
    first = number * slots
    sorted_PS = pairs.starts_P[:, None] + first + jnp.arange(slots)
    pair_S = pairs.order_R[jnp.minimum(sorted_PS.reshape(-1), num_pairs - 1)]
    here_R = (pairs.rank_R >= first) & (pairs.rank_R < first + slots)
    slot_R = jnp.where(here_R, pairs.receiver_R * slots + pairs.rank_R - first, -1)
    counts_PE = _within(pairs.received_PE, first, slots)
    return Turn(pair_S, slot_R, counts_PE.sum(axis=0), *_places(counts_PE, slots, shards))


def _within(sizes_PE: jax.Array, first: jax.Array | int, slots: int) -> jax.Array:
    """Of groups that lie one after another along E, the rows first .. first + slots - 1."""
    ends_PE = jnp.cumsum(sizes_PE, axis=1)
    low_PE = jnp.maximum(ends_PE - sizes_PE, first)
    return jnp.maximum(jnp.minimum(ends_PE, first + slots) - low_PE, 0)


def _places(counts_PE: jax.Array, slots: int, shards: int) -> tuple[jax.Array, jax.Array]:
    """slot_of_row_S and row_of_slot_S: each sender's S slots are sorted by expert already."""
    num_local, total = counts_PE.shape[1], shards * slots
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
