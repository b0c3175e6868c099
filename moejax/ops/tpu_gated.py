"""`moejax.ops.gated_backward` for TPUs: one pass over the rows.

XLA makes three programs of it, one of which writes dL/dhidden in float32, and moves 490 MB of
3,200 x 5,504 where 211 move here. Rows come in blocks, and those in pieces that registers hold.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.ops.gated_ffn import Activation
from moejax.ops.tpu_tiles import DTYPES, LANES, VMEM_BYTES

ROWS = 16  # of a tile in memory, for every type here
PIECE = (32, 4 * LANES)
BLOCKS = (128, 96, 64, 32)
# Room for what registers do not hold. No more than is needed is reserved: XLA keeps operands there.
REGISTERS_BYTES = 4 << 20
MOST_BYTES = VMEM_BYTES - REGISTERS_BYTES
ARRAYS = 6  # three read and three written, each fetched or sent while another is in use


def takes(gate_RF: jax.Array) -> bool:
    """Whether the kernel takes arrays like it."""
    (rows, columns), dtype = gate_RF.shape, gate_RF.dtype
    whole = rows % ROWS == 0 and rows > 0 and columns > 0
    return whole and dtype.name in DTYPES and _bytes(BLOCKS[-1], columns, dtype) <= MOST_BYTES


def _bytes(rows: int, columns: int, dtype: Any) -> int:
    return 2 * ARRAYS * rows * -(-columns // LANES) * LANES * dtype.itemsize


@functools.partial(jax.jit, static_argnums=(4, 5))
def gated_backward_tpu(
    gate_RF: jax.Array,
    up_RF: jax.Array,
    d_hidden_RF: jax.Array,
    weights_R: jax.Array,
    activation: Activation,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See `moejax.ops.gated_backward.gated_backward`; of arrays that `takes` says it takes."""
    (num_rows, columns), dtype = gate_RF.shape, gate_RF.dtype
    block = next(n for n in BLOCKS if _bytes(n, columns, dtype) <= MOST_BYTES)
    wide = pl.BlockSpec((block, columns), lambda i: (i, 0))
    one = pl.BlockSpec((block, 1), lambda i: (i, 0))
    like = jax.ShapeDtypeStruct(gate_RF.shape, dtype)
    moved = ARRAYS * gate_RF.size * dtype.itemsize
    *made, d_weights_R1 = pl.pallas_call(
        functools.partial(_kernel, activation=activation),
        grid=(pl.cdiv(num_rows, block),),
        in_specs=[wide] * 3 + [one],
        out_specs=[wide] * 3 + [one],
        out_shape=[like] * 3 + [jax.ShapeDtypeStruct((num_rows, 1), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=_bytes(block, columns, dtype) + REGISTERS_BYTES,
        ),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=moved, transcendentals=gate_RF.size),
        interpret=interpret,
        name="gated_backward",
    )(gate_RF, up_RF, d_hidden_RF, weights_R[:, None])
    return *made, d_weights_R1[:, 0]


def _kernel(gate, up, d_hidden, weights, d_gate, d_up, hidden, d_weights, *, activation):
    (num_rows, columns), (height, width) = gate.shape, PIECE

    def of_rows(i, _):
        rows = pl.ds(pl.multiple_of(i * height, height), height)
        weight = weights[rows]

        def piece(first, size):
            at = rows, pl.ds(first, size)
            g, u, d = (ref[at].astype(jnp.float32) for ref in (gate, up, d_hidden))
            made, pull = jax.vjp(lambda g, u: activation(g) * u, g, u)
            d_g, d_u = pull(weight * d)
            for ref, value in ((d_gate, d_g), (d_up, d_u), (hidden, weight * made)):
                ref[at] = value.astype(ref.dtype)
            return made * d

        def of_columns(j, total):
            products = piece(pl.multiple_of(j * width, width), width)
            for lane in range(0, width, LANES):
                total += products[:, lane : lane + LANES]
            return total

        total = jnp.zeros((height, LANES), jnp.float32)
        total = jax.lax.fori_loop(0, columns // width, of_columns, total)
        sums = jnp.sum(total, axis=1, keepdims=True)
        if rest := columns % width:
            sums += jnp.sum(piece(columns - rest, rest), axis=1, keepdims=True)
        d_weights[rows] = sums
        return 0

    jax.lax.fori_loop(0, num_rows // height, of_rows, 0)
