"""Gated feed-forward experts on a CPU: a block of rows goes through all of its expert at once.

Group by group, in blocks of a few heights, so that what lies between two products stays in the
processor's cache and is never an array of all rows. A group's last block is masked: it may hold
rows of its neighbours, which are computed in vain and left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.ops.gated_ffn import Activation
from moejax.ops.kept import GROUPED, keep

# Rows of the tallest blocks at most, and of the lowest at least.
MAX_ROWS, MIN_ROWS = 512, 16
# A block's body: (first row, number of rows, which of them count [rows, 1] or None: all, carry).
Body = Callable[[jax.Array, int, jax.Array | None, Any], Any]


def heights(num_rows: int, num_groups: int) -> tuple[int, ...]:
    """Three heights, each a quarter of the one before; the tallest is at most a mean group."""
    mean = max(1, num_rows // max(1, num_groups))
    tallest = min(MAX_ROWS, 1 << (mean.bit_length() - 1))
    found = {min(num_rows, max(MIN_ROWS, tallest >> shift)) for shift in (0, 2, 4)}
    return tuple(sorted(found, reverse=True))


def walk(start: jax.Array, end: jax.Array, num_rows: int, tall: tuple[int, ...], body: Body, carry):
    """Goes through rows [start, end) of one group in whole blocks, then in one that is masked."""
    for height in tall:
        whole = (end - start) // height
        first = start

        def step(i, carry, height=height, first=first):
            return body(first + i * height, height, None, carry)

        carry = jax.lax.fori_loop(0, whole, step, carry)
        start = start + whole * height

    def last(carry):
        row = jnp.minimum(start, num_rows - tall[-1])
        rows = row + jnp.arange(tall[-1])[:, None]
        return body(row, tall[-1], (rows >= start) & (rows < end), carry)

    return jax.lax.cond(end > start, last, lambda carry: carry, carry)


def bounds(group_sizes: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """First row and end of each group, [E]; never past the rows there are."""
    ends = jnp.minimum(jnp.cumsum(group_sizes), num_rows)
    return jnp.minimum(ends - group_sizes, ends), ends


def cut(x_R: jax.Array, row: jax.Array, height: int) -> jax.Array:
    """Rows row .. row + height - 1."""
    return jax.lax.dynamic_slice_in_dim(x_R, row, height)


def put(out_R: jax.Array, y: jax.Array, row: jax.Array, mine: jax.Array | None) -> jax.Array:
    """Writes a block's rows, those that count."""
    y = y.astype(out_R.dtype)
    if mine is not None:
        y = jnp.where(mine, y, cut(out_R, row, y.shape[0]))
    return jax.lax.dynamic_update_slice_in_dim(out_R, y, row, 0)


def dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Summed over one dim of each, in float32 or wider."""
    accum = jnp.promote_types(a.dtype, jnp.float32)
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=accum)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_ffn_cpu(
    activation: Activation,
    x_RD: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    group_sizes: jax.Array,
) -> jax.Array:
    """`moejax.moe.experts.grouped_ffn` of w_gate, w_up [E, D, F] and w_down [E, F, D], unbiased."""
    num_rows = x_RD.shape[0]
    tall = heights(num_rows, group_sizes.size)

    def group(out, operands):
        gate, up, down, start, end = operands

        def body(row, height, mine, out):
            x = cut(x_RD, row, height)
            a, b = (dot(x, w, (1, 0)).astype(x.dtype) for w in (gate, up))
            return put(out, dot(activation(a) * b, down, (1, 0)), row, mine)

        return walk(start, end, num_rows, tall, body, out), None

    operands = (w_gate, w_up, w_down, *bounds(group_sizes, num_rows))
    return jax.lax.scan(group, jnp.zeros_like(x_RD), operands)[0]


def _forward(activation, x_RD, w_gate, w_up, w_down, group_sizes):
    """In two passes, so that where the first is computed again the second is not."""
    num_rows = x_RD.shape[0]
    tall = heights(num_rows, group_sizes.size)
    places = bounds(group_sizes, num_rows)

    def gates(outs, operands):
        gate, up, start, end = operands

        def body(row, height, mine, outs):
            x = cut(x_RD, row, height)
            pairs = zip(outs, (gate, up), strict=True)
            return tuple(put(out, dot(x, w, (1, 0)), row, mine) for out, w in pairs)

        return walk(start, end, num_rows, tall, body, outs), None

    def downs(out, operands):
        down, start, end = operands

        def body(row, height, mine, out):
            a, b = cut(a_RF, row, height), cut(b_RF, row, height)
            return put(out, dot(activation(a) * b, down, (1, 0)), row, mine)

        return walk(start, end, num_rows, tall, body, out), None

    empty = jnp.zeros((num_rows, w_up.shape[2]), x_RD.dtype)
    pair = jax.lax.scan(gates, (empty, empty), (w_gate, w_up, *places))[0]
    a_RF, b_RF = keep(pair, GROUPED)
    y_RD = jax.lax.scan(downs, jnp.zeros_like(x_RD), (w_down, *places))[0]
    return keep(y_RD, GROUPED), (x_RD, a_RF, b_RF, w_gate, w_up, w_down, group_sizes)


def _backward(activation, saved, d_y_RD):
    x_RD, a_RF, b_RF, w_gate, w_up, w_down, group_sizes = saved
    num_rows = x_RD.shape[0]
    tall = heights(num_rows, group_sizes.size)
    accum = jnp.promote_types(x_RD.dtype, jnp.float32)

    def group(d_x_RD, operands):
        gate, up, down, start, end = operands

        def body(row, height, mine, carry):
            d_x_RD, *sums = carry
            x, a, b, d_y = (cut(each, row, height) for each in (x_RD, a_RF, b_RF, d_y_RD))
            if mine is not None:  # zero times what stands in a row of nobody's could be NaN
                x, a, b, d_y = (jnp.where(mine, each, 0) for each in (x, a, b, d_y))
            h, pull = jax.vjp(lambda a, b: activation(a) * b, a, b)
            d_a, d_b = pull(dot(d_y, down, (1, 1)).astype(h.dtype))
            d_x = dot(d_a, gate, (1, 1)) + dot(d_b, up, (1, 1))
            more = (dot(x, d_a, (0, 0)), dot(x, d_b, (0, 0)), dot(h, d_y, (0, 0)))
            sums = [total + part for total, part in zip(sums, more, strict=True)]
            return put(d_x_RD, d_x, row, mine), *sums

        nothing = (jnp.zeros(w.shape, accum) for w in (gate, up, down))
        d_x_RD, *sums = walk(start, end, num_rows, tall, body, (d_x_RD, *nothing))
        return d_x_RD, [total.astype(w_up.dtype) for total in sums]

    operands = (w_gate, w_up, w_down, *bounds(group_sizes, num_rows))
    d_x_RD, d_ws = jax.lax.scan(group, jnp.zeros_like(x_RD), operands)
    return d_x_RD, *d_ws, None


grouped_ffn_cpu.defvjp(_forward, _backward)
