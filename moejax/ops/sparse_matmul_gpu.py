"""Products with chosen blocks for NVIDIA GPUs: Pallas kernels that Triton compiles.

Few rows of x and much of w: what counts is that every program streams a piece of a chosen block.
Into rows: a program makes the products of some rows of one block, D in strips. Out of rows: a
program owns some columns and a share of the chosen blocks, and XLA adds the shares (no atomics, so
every run gives the same bits). Rows of x are padded to the 16 that the tensor cores take; float32
is multiplied as three TF32 products, as in `grouped_matmul_gpu`. Compiled ahead of time for an H100
and run in the interpreter; they have not run on a GPU yet.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moejax.ops.grouped_matmul_gpu import dot

ROWS = 16  # of x, the tensor cores' least
STRIP = 128  # of D, at a time
PROGRAMS = 4 * 132  # that an H100 should have at least, for its 132 multiprocessors
DTYPES = ("float32", "bfloat16", "float16")


def sparse_matmul_gpu(
    x: jax.Array, w_MPD: jax.Array, chosen_K: jax.Array, interpret: bool = False
) -> jax.Array:
    """See `moejax.ops.sparse_matmul.sparse_matmul`; interpret=True runs it on any device.

    Raises NotImplementedError for other types than float32, bfloat16 and float16, for P that is not
    16 times a whole number, for D that is not 32 times one, and for more than 2^31 elements.
    """
    num_blocks, num_rows, size = w_MPD.shape
    fits = num_rows % 16 == 0 and size % 32 == 0 and math.prod(w_MPD.shape) < 2**31
    if str(w_MPD.dtype) not in DTYPES or not fits:
        raise NotImplementedError(
            f"sparse_matmul 'gpu' takes {', '.join(DTYPES)}, P a multiple of 16, D of 32 and fewer "
            f"than 2^31 elements, not {w_MPD.dtype}{list(w_MPD.shape)}: use 'ref'"
        )
    num_batch = x.shape[0]
    x = jnp.pad(x, [(0, -num_batch % ROWS)] + [(0, 0)] * (x.ndim - 1))
    run = _into if x.ndim == 2 else _out_of
    return run(x, w_MPD, chosen_K, interpret)[:num_batch]


def _into(x_BD, w_MPD, chosen_K, interpret) -> jax.Array:
    """A program: 16 to 64 rows of one block, for all of x's rows."""
    num_chosen, (_, num_rows, size) = chosen_K.shape[0], w_MPD.shape
    tile = next(t for t in (64, 32, 16) if num_rows % t == 0)
    strip = math.gcd(size, STRIP)

    def kernel(chosen, x, w, out):
        k, rows = pl.program_id(0), pl.Slice(pl.program_id(1) * tile, tile)
        block = chosen[k]

        def add(i, total):
            at = pl.Slice(i * strip, strip)
            return total + dot(x[:, at], w[block, rows, at], (1, 1), interpret)

        total = jnp.zeros((x.shape[0], tile), jnp.float32)
        total = jax.lax.fori_loop(0, size // strip, add, total)
        out[k, :, rows] = total.astype(out.dtype)

    out_KBP = pl.pallas_call(
        kernel,
        grid=(num_chosen, num_rows // tile),
        out_shape=jax.ShapeDtypeStruct((num_chosen, x_BD.shape[0], num_rows), x_BD.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="sparse_matmul_into",
    )(chosen_K, x_BD, w_MPD)
    return jnp.swapaxes(out_KBP, 0, 1)


def _out_of(x_BKP, w_MPD, chosen_K, interpret) -> jax.Array:
    """A program: some columns, and the blocks of one share, one after the other."""
    num_chosen, (_, num_rows, size) = chosen_K.shape[0], w_MPD.shape
    cols = math.gcd(size, STRIP)
    tile = next(t for t in (32, 16) if num_rows % t == 0)
    shares = _shares(num_chosen, size // cols)
    per_share = num_chosen // shares
    x_KBP = jnp.swapaxes(x_BKP, 0, 1)

    def kernel(chosen, x, w, out):
        share, at = pl.program_id(0), pl.Slice(pl.program_id(1) * cols, cols)

        def add(i, total):
            k = share * per_share + i
            block = chosen[k]
            for first in range(0, num_rows, tile):
                rows = pl.Slice(first, tile)
                total += dot(x[k, :, rows], w[block, rows, at], (1, 0), interpret)
            return total

        total = jnp.zeros((x.shape[1], cols), jnp.float32)
        total = jax.lax.fori_loop(0, per_share, add, total)
        out[share, :, at] = total

    parts = pl.pallas_call(
        kernel,
        grid=(shares, size // cols),
        out_shape=jax.ShapeDtypeStruct((shares, x_KBP.shape[1], size), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="sparse_matmul_out_of",
    )(chosen_K, x_KBP, w_MPD)
    return parts.sum(axis=0).astype(x_BKP.dtype)


@functools.lru_cache
def _shares(num_chosen: int, num_cols: int) -> int:
    """Into how many equal parts the blocks go: the fewest that give enough programs."""
    divisors = [n for n in range(1, num_chosen + 1) if num_chosen % n == 0]
    return next((n for n in divisors if n * num_cols >= PROGRAMS), divisors[-1])
