"""Tokens to the devices of their experts and back in exchanges over a fixed buffer.

The tokens of a device are cut into parts; each part has one exchange of its own, which holds
`factor` times the balanced load, and what does not fit goes in further rounds over the same buffer
until every device has sent everything. Exchanges add up, so the backward pass replays them one by
one and keeps only x, the weights and the routing. It sends x and dL/dy, and gets dL/dx back: the
experts' outputs are not needed again, because dL/dweight_r = <hidden_r, dL/dy_r W_down^T>.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.moe.experts import ExpertParams, grouped_down, grouped_ffn, grouped_hidden
from moejax.moe.experts_backward import Block, gate_and_up, params_backward, rows_backward
from moejax.moe.turns import Part, Turn, count, left_over, part, turn
from moejax.ops.gated_ffn import Activation

# Exchanges that run whatever the load. They do not depend on each other, so one's may run beside
# another's matrix products; and each holds a share of the rows only: fewer take more memory, more
# multiply more rows that only fill a visit. For 4,096 tokens, top 6, 8 experts a device: 1.285
# times the model's in 5 parts, 1.311 in 6 (see BUILD.md).
MAX_PARTS = 5
# But two at least, and no more than leave so many pairs in each: less would fill no matrix unit.
MIN_PAIRS = 4096
# A grouped product on a TPU takes rows in blocks of 16: other numbers would be copied to be padded.
ROWS_TOGETHER = 16
# Names the loops over further rounds in a compiled program: of a balanced load they run none.
UNBALANCED = "unbalanced_rounds"
# Name the exchanges there, with what travels: send_x, send_d_y, back_y, back_d_x.
SEND, BACK = "send_", "back_"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How rows travel: the experts' mesh axis, rows per exchange and receiver, what computes.

    exact: whether rounds go on until nothing is left; else what is left is dropped.
    """

    axis: str
    shards: int
    slots: int
    exact: bool
    activation: Activation
    implementation: str | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The parts, in order of their tokens; the pairs left over; rounds that those take.

    num_rounds is equal on all devices; num_left is this device's pairs in `rest`.
    """

    parts: tuple[Part, ...]
    rest: Part
    num_rounds: jax.Array
    num_left: jax.Array


def bounds(num_tokens: int, top_k: int) -> list[tuple[int, int]]:
    """First token and end of each part; as many parts as there are tokens at most."""
    parts = min(num_tokens, max(2, min(MAX_PARTS, num_tokens * top_k // MIN_PAIRS)))
    ends = [num_tokens * i // parts for i in range(parts + 1)]
    return list(zip(ends[:-1], ends[1:], strict=True))


def slots_per_exchange(num_tokens: int, top_k: int, shards: int, factor: float) -> int:
    """Rows to one receiver in one exchange: factor times the balanced load of the largest part.

    Rounded up so that what a device receives fills blocks of ROWS_TOGETHER.
    """
    most = max(end - first for first, end in bounds(num_tokens, top_k))
    step = ROWS_TOGETHER // math.gcd(shards, ROWS_TOGETHER)
    return -(-math.ceil(factor * most * top_k / shards) // step) * step


def buffer_rows(num_tokens: int, top_k: int, shards: int, factor: float) -> int:
    """Rows that a device sends one way in the exchanges that run whatever the load."""
    slots = slots_per_exchange(num_tokens, top_k, shards, factor)
    return len(bounds(num_tokens, top_k)) * shards * slots


def schedule(
    experts_NK: jax.Array, num_experts: int, exchange: Exchange, axis_names: tuple[str, ...]
) -> Schedule:
    """Sorts each part's pairs by expert, and tells every receiver what is coming."""
    shards, slots, num_local = exchange.shards, exchange.slots, num_experts // exchange.shards
    cut = bounds(*experts_NK.shape)
    pieces = [experts_NK[first:end].reshape(-1) for first, end in cut]
    counts_PIE = jnp.stack(
        [count(experts, num_experts).reshape(shards, num_local) for experts in pieces], axis=1
    )
    received_PIE = jax.lax.all_to_all(counts_PIE, exchange.axis, 0, 0, tiled=True)
    parts = tuple(
        part(experts, None, received_PIE[:, i], num_experts) for i, experts in enumerate(pieces)
    )
    left_R = jnp.concatenate([p.rank_R >= slots for p in parts])
    left_PE = jnp.stack([left_over(received_PIE[:, i], slots) for i in range(len(cut))]).sum(axis=0)
    rest = part(experts_NK.reshape(-1), left_R, left_PE, num_experts)
    most = jax.lax.pmax(jnp.max(rest.rank_R) + 1, axis_names)
    return Schedule(parts, rest, -(-most // slots), left_R.sum())


# What travels, by name: "x" and "d_y" [N, D] as the row of a pair's token, "weights" [N, K] as the
# pair's own number, and back again "y" or "d_x" as rows, "d_weights" as numbers.
Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Products:
    """What happens to received rows, in steps, beside each of which other rows may travel.

    begin: something for `finish`, which makes what goes back and keeps something for `experts`.
    That adds gradients of the experts to their sum so far, in float32: None before the first part,
    and in a forward pass.
    """

    begin: Callable[[Arrays, jax.Array], Arrays]
    finish: Callable[[Arrays, Arrays, jax.Array], tuple[Arrays, Arrays]]
    experts: Callable[[Arrays, jax.Array, ExpertParams | None], ExpertParams | None]


def _send(
    exchange: Exchange, operands: Arrays, pair_S: jax.Array, top_k: int, first: int = 0
) -> Arrays:
    """The slots of one exchange as they are received: sender by sender, any row where none is.

    pair_S counts from token `first` on: slices of the operands would be copies.
    """
    pair_S = first * top_k + pair_S
    found = {}
    for name, array in operands.items():
        sent = array.reshape(-1)[pair_S] if name == "weights" else array[pair_S // top_k]
        with jax.named_scope(f"{SEND}{name}"):
            found[name] = _swap(sent, exchange)
    return found


def _sorted(got: Arrays, one: Turn) -> Arrays:
    """What was received, by expert."""
    return {name: a[one.slot_of_row_S] for name, a in got.items()}


def _finished(products: Products, rows: Arrays, begun: Arrays, one: Turn) -> tuple[Arrays, Arrays]:
    """Results, each back in the slot that its row came from; and what the experts need."""
    out, kept = products.finish(rows, begun, one.sizes_E)
    return {name: a[one.row_of_slot_S] for name, a in out.items()}, kept


def _send_back(exchange: Exchange, out: Arrays) -> Arrays:
    found = {}
    for name, array in out.items():
        with jax.named_scope(f"{BACK}{name}"):
            found[name] = _swap(array, exchange)
    return found


def _collect(back: Arrays, weights_NK: jax.Array, one: Turn) -> Arrays:
    """Per token: its rows' sum by their weights, choice by choice, in float32; its numbers."""
    slot_NK = one.slot_R.reshape(weights_NK.shape)
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


def _first_exchanges(
    exchange: Exchange, products: Products, operands: Arrays, weights_NK: jax.Array, moves: Schedule
) -> tuple[Arrays, Any]:
    """The exchange of each part, as a pipeline: what all tokens get, gradients of the experts.

    While part i begins, the results of part i - 1 may still be on their way; while it finishes, the
    rows of part i + 1 are; while the experts' gradients of part i are computed, its own results.
    Barriers keep it so, and keep more than that from being in memory.
    """
    fence = jax.lax.optimization_barrier
    num_tokens, top_k = weights_NK.shape
    cut = bounds(num_tokens, top_k)
    turns = [turn(pairs, 0, exchange.slots) for pairs in moves.parts]
    weights = [weights_NK[first:end] for first, end in cut]
    found, total, back = [], None, None
    got = _send(exchange, operands, turns[0].pair_S, top_k)
    for i, one in enumerate(turns):
        rows = _sorted(got, one)
        begun = products.begin(rows, one.sizes_E)
        after_S = [after.pair_S for after in turns[i + 1 : i + 2]]
        rows, begun, back, after_S = fence((rows, begun, back, after_S))
        if back is not None:
            found.append(_collect(back, weights[i - 1], turns[i - 1]))
        coming: Arrays = {}
        if after_S:
            coming = _send(exchange, operands, after_S[0], top_k, cut[i + 1][0])
        out, kept = _finished(products, rows, begun, one)
        out, kept, coming = fence((out, kept, coming))
        back = _send_back(exchange, out)
        total = products.experts(kept, one.sizes_E, total)
        total, got, found[-1:] = fence((total, coming, found[-1:]))
    assert back is not None
    found.append(_collect(back, weights[-1], turns[-1]))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found), total


def _every_exchange(
    exchange: Exchange, products: Products, operands: Arrays, weights_NK: jax.Array, moves: Schedule
) -> tuple[Arrays, Any]:
    """Those of the parts and, if the exchange is exact, rounds until nothing is left."""
    first = _first_exchanges(exchange, products, operands, weights_NK, moves)
    if not exchange.exact:
        return first

    def step(carry):
        number, (found, total) = carry
        one = turn(moves.rest, number, exchange.slots)
        got = _send(exchange, operands, one.pair_S, weights_NK.shape[1])
        rows = _sorted(got, one)
        out, kept = _finished(products, rows, products.begin(rows, one.sizes_E), one)
        more = _collect(_send_back(exchange, out), weights_NK, one)
        total = products.experts(kept, one.sizes_E, total)
        return number + 1, (jax.tree.map(jnp.add, found, more), total)

    start = (jnp.zeros((), jnp.int32), first)
    with jax.named_scope(UNBALANCED):
        return jax.lax.while_loop(lambda carry: carry[0] < moves.num_rounds, step, start)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def all_exchanges(
    exchange: Exchange, x_ND: jax.Array, weights_NK: jax.Array, experts: Any, moves: Schedule
) -> jax.Array:
    """y of every pair that travels, in the memory of two exchanges: float32 [N, D].

    Gradients of the experts are summed over exchanges in float32.
    """
    products = _forward_products(exchange, experts)
    return _every_exchange(exchange, products, {"x": x_ND}, weights_NK, moves)[0]["y"]


def _all_forward(exchange, x_ND, weights_NK, experts, moves):
    saved = (x_ND, weights_NK, experts, moves)
    return all_exchanges(exchange, *saved), saved


def _all_backward(exchange, saved, d_y_ND):
    x_ND, weights_NK, experts, moves = saved
    # The barrier keeps the float32 original from living on in its place.
    d_y_ND = jax.lax.optimization_barrier(d_y_ND.astype(x_ND.dtype))
    operands = {"x": x_ND, "d_y": d_y_ND, "weights": weights_NK}
    make = _tuned_products if "tuned" in experts else _backward_products
    found, d_experts = _every_exchange(
        exchange, make(exchange, experts), operands, weights_NK, moves
    )
    cast = lambda d, w: d.astype(w.dtype)  # noqa: E731
    if "tuned" in experts:  # None is zero: the others are not trained, and numbers never are
        own = {name: cast(d, experts["tuned"][name]) for name, d in d_experts.items()}
        d_experts = {name: None for name in experts} | {"tuned": own | {"ids_M": None}}
    else:
        d_experts = jax.tree.map(cast, d_experts, experts)
    return found["d_x"].astype(x_ND.dtype), found["d_weights"], d_experts, None


all_exchanges.defvjp(_all_forward, _all_backward)


def _forward_products(exchange: Exchange, experts: ExpertParams) -> Products:
    implementation = exchange.implementation
    kinds = (exchange.activation, implementation)

    def begin(rows, sizes_E):
        if "tuned" in experts:
            return {"y": grouped_ffn(experts, rows["x"], sizes_E, *kinds)}
        return {"hidden": grouped_hidden(experts, rows["x"], sizes_E, *kinds)}

    def finish(rows, begun, sizes_E):
        if "tuned" in experts:
            return begun, {}
        return {"y": grouped_down(experts, begun["hidden"], sizes_E, implementation)}, {}

    return Products(begin, finish, lambda kept, sizes_E, total: None)


def _backward_products(exchange: Exchange, experts: ExpertParams) -> Products:
    kinds = (exchange.activation, exchange.implementation)

    def begin(rows, sizes_E):
        return gate_and_up(Block(sizes_E, *kinds), experts, rows["x"])

    def finish(rows, begun, sizes_E):
        d_x, d_weights, kept = rows_backward(Block(sizes_E, *kinds), experts, rows, begun)
        return {"d_x": d_x, "d_weights": d_weights}, kept

    def of_experts(kept, sizes_E, total):
        return params_backward(Block(sizes_E, *kinds), experts, kept, total)

    return Products(begin, finish, of_experts)


def _tuned_products(exchange: Exchange, experts: ExpertParams) -> Products:
    """Of a stack with trained experts in "tuned": gradients of those alone."""
    ids_M = experts["tuned"]["ids_M"]
    own = {name: w for name, w in experts["tuned"].items() if name != "ids_M"}

    def finish(rows, begun, sizes_E):
        def block(own, x_RD):
            params = experts | {"tuned": own | {"ids_M": ids_M}}
            return grouped_ffn(params, x_RD, sizes_E, exchange.activation, exchange.implementation)

        y_RD, pull = jax.vjp(block, own, rows["x"])
        d_y_RD = rows["d_y"].astype(jnp.float32)
        d_weights = jnp.sum(y_RD.astype(jnp.float32) * d_y_RD, axis=1)
        d_own, d_x = pull((rows["weights"][:, None] * d_y_RD).astype(y_RD.dtype))
        return {"d_x": d_x, "d_weights": d_weights}, d_own

    def of_experts(kept, sizes_E, total):
        return _add(total, kept)

    return Products(lambda rows, sizes_E: {}, finish, of_experts)


def _add(total, more):
    """Sums in float32; total may be None."""
    more = jax.tree.map(lambda d: d.astype(jnp.float32), more)
    return more if total is None else jax.tree.map(jnp.add, total, more)


def _swap(rows_S: jax.Array, exchange: Exchange) -> jax.Array:
    """Block p of each device to device p; its own inverse."""
    return jax.lax.all_to_all(rows_S, exchange.axis, 0, 0, tiled=True)
