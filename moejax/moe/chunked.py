"""Tokens to the devices of their experts and back in exchanges over a fixed buffer.

The tokens of a device are cut into parts; each part has one exchange of its own, which holds
`factor` times the balanced load, and what does not fit goes in further ones over the same buffer
until every device has sent everything. Exchanges add up, so the backward pass replays them one by
one and needs only x, the weights and the routing. It sends x and dL/dy, and gets dL/dx back: the
experts' outputs are not needed again, because dL/dweight_r = <hidden_r, dL/dy_r W_down^T>. Where
memory allows (`Exchange.keep`) the rows and the first products of the parts' exchanges are kept,
and x does not travel again.

All of them are one loop, whose length depends on the load and is equal on all devices: a program
holds an exchange's products twice, in the loop and at its ends, however many there are. On a GPU,
whose host waits at every turn of such a loop, those of the parts are written out.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core.platform import platform
from moejax.moe.exchange_products import (
    Arrays,
    Products,
    backward_products,
    forward_products,
    tuned_products,
)
from moejax.moe.turns import Queues, Turn, pairs_sent, queues, slots_of, turn
from moejax.ops.gated_ffn import Activation
from moejax.ops.kept import EXCHANGED, keep

# Exchanges that run whatever the load. They do not depend on each other, so one's may run beside
# another's matrix products; and each holds a share of the rows only: fewer take more memory, more
# multiply more rows that only fill a visit. For 4,096 tokens, top 6, 8 experts a device: 1.284
# times the model's in 5 parts, 1.311 in 6 (see BUILD.md).
MAX_PARTS = 5
# But two at least, and no more than leave so many pairs in each: less would fill no matrix unit.
MIN_PAIRS = 4096
# A grouped product on a TPU takes rows in blocks of 16: other numbers would be copied to be padded.
ROWS_TOGETHER = 16
# Names the loops over exchanges in a compiled program, with the trips that a balanced load takes.
BALANCED = "balanced_trips_"
# Name the exchanges there, with what travels: send_x, send_d_y, back_y, back_d_x.
SEND, BACK = "send_", "back_"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How rows travel: the experts' mesh axis, rows per exchange and receiver, what computes.

    exact: whether turns go on until nothing is left; else what is left is dropped. keep: whether
    the backward pass finds what the parts' turns brought and computed, and does neither again.
    """

    axis: str
    shards: int
    slots: int
    exact: bool
    activation: Activation
    implementation: str | None
    keep: bool = False

    @property
    def kinds(self) -> tuple[Activation, str | None]:
        return self.activation, self.implementation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """What travels in which turn; how many turns there are; what is left after those of the parts.

    num_turns is equal on all devices; num_left is this device's pairs.
    """

    pairs: Queues
    num_turns: jax.Array
    num_left: jax.Array


def part_tokens(num_tokens: int, top_k: int) -> int:
    """Tokens of a part, of the last one perhaps fewer."""
    return -(-num_tokens // max(2, min(MAX_PARTS, num_tokens * top_k // MIN_PAIRS)))


def slots_per_exchange(num_tokens: int, top_k: int, shards: int, factor: float) -> int:
    """Rows to one receiver in one exchange: factor times the balanced load of a part.

    Rounded up so that what a device receives fills blocks of ROWS_TOGETHER.
    """
    rows = factor * part_tokens(num_tokens, top_k) * top_k
    step = ROWS_TOGETHER // math.gcd(shards, ROWS_TOGETHER)
    return -(-math.ceil(rows / shards) // step) * step


def buffer_rows(num_tokens: int, top_k: int, shards: int, factor: float) -> int:
    """Rows that a device sends one way in the exchanges that run whatever the load."""
    parts = -(-num_tokens // part_tokens(num_tokens, top_k))
    return parts * shards * slots_per_exchange(num_tokens, top_k, shards, factor)


def schedule(
    experts_NK: jax.Array, num_experts: int, exchange: Exchange, axis_names: tuple[str, ...]
) -> Schedule:
    """Puts pairs in their order, and tells every receiver what is coming."""
    swap = functools.partial(_swap, exchange=exchange)
    size = part_tokens(*experts_NK.shape)
    pairs = queues(experts_NK, num_experts, exchange.shards, size, exchange.slots, swap)
    rank_R = pairs.rank_2R[1]
    num_turns = jnp.asarray(pairs.num_parts, jnp.int32)
    if exchange.exact:
        num_turns += -(-jax.lax.pmax(jnp.max(rank_R) + 1, axis_names) // exchange.slots)
    return Schedule(pairs, num_turns, jnp.sum(rank_R >= 0))


@dataclasses.dataclass(frozen=True)
class _Traffic:
    """The exchanges of one pass: what travels, and by which weights what comes back is summed."""

    exchange: Exchange
    pairs: Queues
    operands: Arrays
    weights_NK: jax.Array

    def sent(self, number: Any) -> jax.Array:
        """The pairs that travel in turn `number`."""
        return pairs_sent(self.pairs, number, self.exchange.slots)

    def send(self, pair_S: jax.Array, names: Iterable[str]) -> Arrays:
        """Rows of those pairs as they are received: sender by sender, any row where none is."""
        found = {}
        for name in names:
            array = self.operands[name]
            rows = pair_S // self.weights_NK.shape[1]
            sent = array.reshape(-1)[pair_S] if name == "weights" else array[rows]
            with jax.named_scope(f"{SEND}{name}"):
                found[name] = _swap(sent, self.exchange)
        return found

    def turn(self, number: Any) -> Turn:
        """Where the rows of turn `number` go."""
        return turn(self.pairs, number, self.exchange.slots)

    def send_back(self, out: Arrays) -> Arrays:
        """Rows in the slots in which they came, to where they came from."""
        found = {}
        for name, array in out.items():
            with jax.named_scope(f"{BACK}{name}"):
                found[name] = _swap(array, self.exchange)
        return found

    def nothing(self, names: tuple[str, ...], width: int) -> Arrays:
        """What tokens have got so far, at first: float32 [N, width], [N, K] of d_weights."""
        shape = self.weights_NK.shape
        widths = {name: shape[1] if name == "d_weights" else width for name in names}
        return {name: jnp.zeros((shape[0], n), jnp.float32) for name, n in widths.items()}

    def collect(self, back: Arrays, number: Any, found: Arrays) -> Arrays:
        """Adds what turn `number` brought back: a turn of a part to its tokens, others to all."""
        (num_tokens, top_k), parts = self.weights_NK.shape, self.pairs.num_parts
        size = part_tokens(num_tokens, top_k)

        def piece(at, found):
            # The last tokens are in a piece of that many too: some are the one's before.
            begin = jnp.minimum(at * size, num_tokens - size)
            slots = self.exchange.slots
            slot_R = slots_of(self.pairs, number, slots, begin * top_k, size * top_k)
            mine_N1 = (begin + jnp.arange(size) >= at * size)[:, None]
            slot_NK = jnp.where(mine_N1, slot_R.reshape(size, top_k), -1)
            weights_NK = jax.lax.dynamic_slice_in_dim(self.weights_NK, begin, size)
            for name, more in _per_token(back, weights_NK, slot_NK).items():
                before = jax.lax.dynamic_slice_in_dim(found[name], begin, size)
                whole = jax.lax.dynamic_update_slice_in_dim(found[name], before + more, begin, 0)
                found = found | {name: whole}
            return found

        of_part = number < parts
        first, end = jnp.where(of_part, number, 0), jnp.where(of_part, number + 1, parts)
        with jax.named_scope(f"{BALANCED}1"):
            return jax.lax.fori_loop(first, end, piece, found)


def _per_token(back: Arrays, weights_NK: jax.Array, slot_NK: jax.Array) -> Arrays:
    """Per token: its rows' sum by their weights, choice by choice, in float32; its numbers."""
    found = {}
    for name, array in back.items():
        if name == "d_weights":
            found[name] = jnp.where(slot_NK >= 0, array[jnp.maximum(slot_NK, 0)], 0.0)
            continue
        total_ND = jnp.zeros((slot_NK.shape[0], array.shape[1]), jnp.float32)
        for k in range(slot_NK.shape[1]):
            slot_N1 = slot_NK[:, k, None]
            row_ND = jnp.where(slot_N1 >= 0, array[jnp.maximum(slot_N1[:, 0], 0)], 0)
            row_ND = row_ND.astype(jnp.float32)
            total_ND += weights_NK[:, k, None] * row_ND if name == "y" else row_ND
        found[name] = total_ND
    return found


def _every_exchange(
    exchange: Exchange, products: Products, operands: Arrays, weights_NK: jax.Array, moves: Schedule
) -> tuple[Arrays, Any, dict[str, Arrays]]:
    """All turns, as a pipeline: what all tokens get, gradients of the experts, what is kept.

    While a turn finishes, x of the next one may be on its way (where x is kept, dL/dy; written out,
    all of it); while the experts' gradients are computed dL/dy, and while the next one begins its
    own results. Barriers keep it so, and keep more than that out of memory.
    """
    fence = jax.lax.optimization_barrier
    traffic = _Traffic(exchange, moves.pairs, operands, weights_NK)
    written_out = products.written_out or platform() == "gpu"
    early, ahead, behind = _order(tuple(operands), products, written_out)
    at_once = bool(products.kept)  # what goes back has no products of a next turn to travel beside
    parts = moves.pairs.num_parts

    def anew(number, one, sizes):
        sent = traffic.send(traffic.sent(number), ("x",))
        rows = {"x": sent["x"][one.slot_of_row_S]}
        return rows | products.begin(rows, sizes)

    noted: dict[str, Arrays] = {}  # what is kept of turns whose number is known

    def begin(number, first, others, rest):
        one = traffic.turn(number)
        rows = {name: a[one.slot_of_row_S] for name, a in first.items()}
        if products.kept:
            sizes = products.sizes({"x": products.kept["0"]["x"]}, one.sizes_E)
            again = functools.partial(anew, number, one, sizes)
            begun = dict(_recall(products.kept, number, parts, again))
            rows["x"] = begun.pop("x")
        else:
            sizes = products.sizes(rows, one.sizes_E)
            begun, others = fence((products.begin(rows, sizes), others))
            if products.keeps:
                mine = {name: (rows | begun)[name] for name in products.keeps}
                rest = _note(noted, rest, mine, number, parts)
                rows, begun = {}, {"hidden": begun["hidden"]}  # a forward pass needs no more
        rows |= {name: a[one.slot_of_row_S] for name, a in others.items()}
        return sizes, one.row_of_slot_S, rows, begun, rest

    def finish(sizes, row_of_slot_S, rows, begun):
        out, kept = products.finish(rows, begun, sizes)
        return {name: a[row_of_slot_S] for name, a in out.items()}, kept

    def step(carry):
        number, (*begun, rest), found, total = carry
        sent_S = traffic.sent(number)
        first = traffic.send(sent_S, early)
        out, kept, first, sent_S = fence((*finish(*begun), first, sent_S))
        others, back = traffic.send(sent_S, ahead), traffic.send_back(out if at_once else {})
        total = products.experts(kept, begun[0], total, number == 1)
        total, first, out, sent_S, others = fence((total, first, out, sent_S, others))
        back, others = back or traffic.send_back(out), others | traffic.send(sent_S, behind)
        begun, back = fence((begin(number, first, others, rest), back))
        return number + 1, begun, traffic.collect(back, number - 1, found), total

    sent_S = traffic.sent(0)
    *begun, _ = begin(0, traffic.send(sent_S, early), traffic.send(sent_S, ahead + behind), {})
    rest = {} if written_out else _room(noted.get("0", {}), parts - 1)
    found = traffic.nothing(products.gives, operands["x"].shape[1])
    carry: Any = (1, (*begun, rest), found, products.start)
    for _ in range(1, parts if written_out else 1):
        carry = step(carry)
    carry = (jnp.asarray(done := carry[0], jnp.int32), *carry[1:])
    with jax.named_scope(f"{BALANCED}{parts - done}"):
        number, (*begun, rest), found, total = jax.lax.while_loop(
            lambda carry: carry[0] < moves.num_turns, step, carry
        )
    out, kept = fence(finish(*begun))
    back = traffic.send_back(out)
    total = products.experts(kept, begun[0], total, number == 1)
    stash = noted | ({REST: rest} if rest else {})
    return traffic.collect(back, number - 1, found), total, stash


def _order(names: tuple[str, ...], products: Products, written_out: bool) -> tuple[tuple, ...]:
    """What of the next turn travels beside the end of one, beside its experts' gradients, and then.

    A device has one exchange under way at a time, and one of numbers would take the place of rows.
    """
    travel = tuple(name for name in names if not (products.kept and name == "x"))
    early = travel if written_out else travel[:1]
    late = travel[len(early) :]
    return early, late if products.kept else late[:1], () if products.kept else late[1:]


# What is kept of the parts' turns: by the number of the turn, or of those in the loop, whose number
# is known to the device alone, in one array each [T - 1, ...].
REST = "rest"


def _room(kept: Arrays, turns: int) -> Arrays:
    made = {name: jax.lax.empty((turns, *a.shape), a.dtype) for name, a in kept.items()}
    return made if turns else {}


def _note(noted: dict[str, Arrays], rest: Arrays, mine: Arrays, number: Any, parts: int) -> Arrays:
    """Keeps what turn `number` has, if it is one of the parts'; `rest` of those in the loop."""
    if isinstance(number, int):
        noted[str(number)] = mine
    if isinstance(number, int) or not rest:
        return rest

    def put(_, rest):
        put_one = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
        return {name: put_one(rest[name], a, number - 1) for name, a in mine.items()}

    with jax.named_scope(f"{BALANCED}1"):
        return jax.lax.fori_loop(0, jnp.where(number < parts, 1, 0), put, rest)


def _recall(kept: dict[str, Arrays], number: Any, parts: int, anew: Callable[[], Arrays]) -> Arrays:
    """What is kept of turn `number`; of a turn beyond the parts', all of it anew."""
    if isinstance(number, int):
        return kept[str(number)]
    if REST not in kept:
        return anew()
    at = jnp.minimum(number, parts - 1) - 1
    found = {
        name: jax.lax.dynamic_index_in_dim(a, at, 0, keepdims=False)
        for name, a in kept[REST].items()
    }
    with jax.named_scope(f"{BALANCED}0"):
        return jax.lax.fori_loop(0, jnp.where(number < parts, 0, 1), lambda *_: anew(), found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def all_exchanges(
    exchange: Exchange, x_ND: jax.Array, weights_NK: jax.Array, experts: Any, moves: Schedule
) -> jax.Array:
    """y of every pair that travels, in the memory of two exchanges: float32 [N, D].

    Gradients of the experts are summed over exchanges in float32.
    """
    products = forward_products(exchange.kinds, experts)
    return _every_exchange(exchange, products, {"x": x_ND}, weights_NK, moves)[0]["y"]


def _all_forward(exchange, x_ND, weights_NK, experts, moves):
    keeps = exchange.keep and "tuned" not in experts
    products = forward_products(exchange.kinds, experts, keeps)
    found, _, stash = _every_exchange(exchange, products, {"x": x_ND}, weights_NK, moves)
    return found["y"], (x_ND, weights_NK, experts, moves, keep(stash, EXCHANGED))


def _all_backward(exchange, saved, d_y_ND):
    x_ND, weights_NK, experts, moves, kept = saved
    # The barrier keeps the float32 original from living on in its place.
    d_y_ND = jax.lax.optimization_barrier(d_y_ND.astype(x_ND.dtype))
    operands = {"x": x_ND, "d_y": d_y_ND, "weights": weights_NK}
    if "tuned" in experts:
        products = tuned_products(exchange.kinds, experts)
    else:
        products = backward_products(exchange.kinds, experts, kept or None)
    found, d_experts, _ = _every_exchange(exchange, products, operands, weights_NK, moves)
    cast = lambda d, w: d.astype(w.dtype)  # noqa: E731
    if "tuned" in experts:  # None is zero: the others are not trained, and numbers never are
        own = {name: cast(d, experts["tuned"][name]) for name, d in d_experts.items()}
        d_experts = {name: None for name in experts} | {"tuned": own | {"ids_M": None}}
    else:
        d_experts = jax.tree.map(cast, d_experts, experts)
    return found["d_x"].astype(x_ND.dtype), found["d_weights"], d_experts, None


all_exchanges.defvjp(_all_forward, _all_backward)


def _swap(rows_S: jax.Array, exchange: Exchange) -> jax.Array:
    """Block p of each device to device p; its own inverse."""
    return jax.lax.all_to_all(rows_S, exchange.axis, 0, 0, tiled=True)
