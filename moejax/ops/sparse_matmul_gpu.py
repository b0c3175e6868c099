"""Products with chosen blocks for NVIDIA GPUs: Pallas kernels that Triton compiles.

Few rows of x and much of w: what counts is that enough of w is under way at any time. Into rows: a
program makes the products of some rows of one block, D in strips. Out of rows: a program owns some
columns and a share of the chosen rows, and XLA adds the shares (no atomics, so every run gives the
same bits). A gated layer's two products into rows are one kernel with what follows.

Rows of x are multiplied element by element in float32, up to FEW together, where that keeps up with
the memory; others go through the tensor cores, 16 and more together, float32 as three TF32 products
(`grouped_matmul_gpu`). Where the one ends and the other begins, and the sizes, were timed on an
H200 (2026-11-26).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moejax.ops.gated_ffn import Activation
from moejax.ops.grouped_matmul_gpu import dot

# Element by element: rows of x together, elements of w at a time, and of D: that a step into rows
# takes, that a program out of rows owns.
FEW, STEP, STRIP, COLS = 4, 4096, 256, 128
# On the tensor cores: rows of x together at most, rows of a block out of rows, and of D.
TENSOR_BATCH, TENSOR_ROWS, TENSOR_STRIP = 64, 32, 128
# Rows of x up to which it goes element by element, by bytes of an element of w: TF32 needs three
# products for one, and 16-bit types convert on the way.
MOST = {2: 1, 4: 16}
PROGRAMS = 4 * 132  # that a Hopper GPU should have at least, for its 132 multiprocessors
DTYPES = ("float32", "bfloat16", "float16")
_Finish = Callable[[list[jax.Array], dict[str, jax.Array]], jax.Array]


def sparse_matmul_gpu(
    x: jax.Array, w_MPD: jax.Array, chosen_K: jax.Array, interpret: bool = False
) -> jax.Array:
    """See `moejax.ops.sparse_matmul.sparse_matmul`; interpret=True runs it on any device.

    Raises NotImplementedError for other types than float32, bfloat16 and float16, for P that is not
    16 times a whole number, for D that is not 32 times one, and for more than 2^31 elements.
    """
    check(w_MPD)
    if x.ndim == 2:
        return _into(x, [w_MPD], chosen_K, interpret)[0]
    return _out_of(x, w_MPD, chosen_K, interpret)


def sparse_ffn_gpu(
    params: dict[str, Any],
    x_BD: jax.Array,
    chosen_K: jax.Array,
    activation: Activation,
    weight_BK: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `moejax.ops.sparse_ffn.sparse_ffn`, without b_down: two kernels and a sum.

    The hidden neurons are float32 until they are complete.
    """
    stacks = [params[name] for name in ("rows_gate", "rows_up") if name in params]
    check(params["rows_down"])
    x_BD = x_BD.astype(stacks[0].dtype)
    extras: dict[str, jax.Array] = {n: params[n] for n in ("b_gate", "b_up") if n in params}
    if weight_BK is not None:
        extras["weight"] = weight_BK.astype(jnp.float32)

    def hidden(products: list[jax.Array], extras: dict[str, jax.Array]) -> jax.Array:
        *gate, up = products
        up = up + extras.get("b_up", 0)
        h = activation(gate[0] + extras.get("b_gate", 0)) * up if gate else activation(up)
        return h * extras.get("weight", 1)

    if _lowers(activation):
        (h_BKP,) = _into(x_BD, stacks, chosen_K, interpret, hidden, extras)
    else:
        products = _into(x_BD, stacks, chosen_K, interpret)
        given = {n: a[:, :, None] if n == "weight" else a[chosen_K] for n, a in extras.items()}
        h_BKP = hidden(products, given).astype(x_BD.dtype)
    return _out_of(h_BKP, params["rows_down"], chosen_K, interpret)


def check(w_MPD: jax.Array) -> None:
    """Raises NotImplementedError for blocks that the kernels cannot multiply or address."""
    _, num_rows, size = w_MPD.shape
    fits = num_rows % 16 == 0 and size % 32 == 0 and math.prod(w_MPD.shape) < 2**31
    if str(w_MPD.dtype) not in DTYPES or not fits:
        raise NotImplementedError(
            f"sparse_matmul 'gpu' takes {', '.join(DTYPES)}, P a multiple of 16, D of 32 and fewer "
            f"than 2^31 elements, not {w_MPD.dtype}{list(w_MPD.shape)}: use 'ref'"
        )


def _lowers(activation: Activation) -> bool:
    """Whether Pallas' Triton can compile it: it has no error function."""
    return "erf" not in str(jax.make_jaxpr(activation)(jnp.float32(0)))


def _into(
    x_BD: jax.Array,
    stacks: list[jax.Array],
    chosen_K: jax.Array,
    interpret: bool,
    finish: _Finish | None = None,
    extras: Mapping[str, jax.Array] = MappingProxyType({}),
) -> list[jax.Array]:
    """[B, K, P] of each stack's products, or the one that `finish` makes of them all.

    finish(products, extras): float32 of some rows of a block, [rows] for a row of x or [B, rows].
    extras: "weight" [B, K] and biases [M, P], of which it gets what belongs to them.
    """
    num_batch, num_stacks = x_BD.shape[0], len(stacks)
    batch = _batch_of(num_batch, stacks[0].dtype)
    few, x_BD = batch.few, batch.padded(x_BD)
    extras = {n: batch.padded(a) if n == "weight" else a for n, a in extras.items()}
    num_chosen, (_, num_rows, size) = chosen_K.shape[0], stacks[0].shape
    strip = math.gcd(size, STRIP if few else TENSOR_STRIP)
    tile = _rows_at_a_time(num_rows, num_chosen * batch.tiles, strip if few else 0)

    def kernel(chosen, x, *refs):  # type: ignore
        ws, outs = refs[:num_stacks], refs[num_stacks + len(extras) :]
        k, rows = pl.program_id(0), pl.Slice(pl.program_id(1) * tile, tile)
        block, parts = chosen[k], batch.parts(pl.program_id(2))

        def add(i, totals):  # type: ignore
            at = pl.Slice(i * strip, strip)
            xs, pieces = [x[part, at] for part in parts], [w[block, rows, at] for w in ws]
            if not few:
                return [
                    [t + dot(xs[0], w, (1, 1), interpret)]
                    for (t,), w in zip(totals, pieces, strict=True)
                ]
            xs, pieces = ([a.astype(jnp.float32) for a in each] for each in (xs, pieces))
            return [
                [t + w * x[None] for t, x in zip(ts, xs, strict=True)]
                for ts, w in zip(totals, pieces, strict=True)
            ]

        zeros = jnp.zeros((tile, strip) if few else (batch.size, tile), jnp.float32)
        totals = [[zeros] * len(parts)] * num_stacks
        totals = jax.lax.fori_loop(0, size // strip, add, totals)
        for part, products in zip(parts, zip(*totals, strict=True), strict=True):
            made = [y.sum(axis=1) if few else y for y in products]
            if finish is not None:
                given = dict(zip(extras, refs[num_stacks:], strict=False))
                loaded = {n: a[block, rows] for n, a in given.items() if n != "weight"}
                if "weight" in given:
                    weight = given["weight"][part, k]
                    loaded["weight"] = weight if few else weight[:, None]
                made = [finish(made, loaded)]
            for out, y in zip(outs, made, strict=True):
                out[part, k, rows] = y.astype(out.dtype)

    out = jax.ShapeDtypeStruct((x_BD.shape[0], num_chosen, num_rows), x_BD.dtype)
    made = pl.pallas_call(
        kernel,
        grid=(num_chosen, num_rows // tile, batch.tiles),
        out_shape=[out] * (num_stacks if finish is None else 1),
        compiler_params=plgpu.CompilerParams(num_warps=4 if few else 2, num_stages=4),
        interpret=interpret,
        name="sparse_matmul_into",
    )(chosen_K, x_BD, *stacks, *extras.values())
    return [y[:num_batch] for y in made]


def _out_of(x_BKP: jax.Array, w_MPD: jax.Array, chosen_K: jax.Array, interpret: bool) -> jax.Array:
    """[B, D]: a program takes some columns and a share of the chosen rows, `tile` at a time."""
    num_batch, batch = x_BKP.shape[0], _batch_of(x_BKP.shape[0], w_MPD.dtype)
    few, x_BKP = batch.few, batch.padded(x_BKP)
    num_chosen, (_, num_rows, size) = chosen_K.shape[0], w_MPD.shape
    cols = math.gcd(size, COLS if few else TENSOR_STRIP)
    tile = math.gcd(num_rows, STEP // cols if few else TENSOR_ROWS)
    per_block, num_tiles = num_rows // tile, num_chosen * num_rows // tile
    wanted = 2 * PROGRAMS if few else PROGRAMS
    shares = min(num_tiles, pl.cdiv(wanted, size // cols * batch.tiles))
    per_share = pl.cdiv(num_tiles, shares)
    shares = pl.cdiv(num_tiles, per_share)

    def kernel(chosen, x, w, out):  # type: ignore
        share, at = pl.program_id(0), pl.Slice(pl.program_id(1) * cols, cols)
        parts = batch.parts(pl.program_id(2))
        first = share * per_share

        def add(i, totals):  # type: ignore
            k = (first + i) // per_block
            rows = pl.Slice((first + i) % per_block * tile, tile)
            xs, piece = [x[part, k, rows] for part in parts], w[chosen[k], rows, at]
            if not few:
                return [totals[0] + dot(xs[0], piece, (1, 0), interpret)]
            piece = piece.astype(jnp.float32)
            return [
                t + piece * x.astype(jnp.float32)[:, None] for t, x in zip(totals, xs, strict=True)
            ]

        shape = (tile, cols) if few else (batch.size, cols)
        totals = [jnp.zeros(shape, jnp.float32)] * len(parts)
        steps = jnp.minimum(per_share, num_tiles - first)
        for part, total in zip(parts, jax.lax.fori_loop(0, steps, add, totals), strict=True):
            out[share, part, at] = total.sum(axis=0) if few else total

    made = pl.pallas_call(
        kernel,
        grid=(shares, size // cols, batch.tiles),
        out_shape=jax.ShapeDtypeStruct((shares, x_BKP.shape[0], size), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4 if few else 2, num_stages=4),
        interpret=interpret,
        name="sparse_matmul_out_of",
    )(chosen_K, x_BKP, w_MPD)
    return made.sum(axis=0)[:num_batch].astype(x_BKP.dtype)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """x's rows as programs take them: `tiles` times `size`, one by one if few, else together."""

    size: int
    tiles: int
    few: bool

    def padded(self, x: jax.Array) -> jax.Array:
        """With rows of zeros to whole tiles."""
        more = self.size * self.tiles - x.shape[0]
        return jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)) if more else x

    def parts(self, tile: jax.Array) -> list[Any]:
        """What to index the batch with, for the program of this tile."""
        first = tile * self.size
        return [first + i for i in range(self.size)] if self.few else [pl.Slice(first, self.size)]


def _batch_of(num: int, dtype: Any) -> _Batch:
    few = num <= MOST[jnp.dtype(dtype).itemsize]
    # Triton takes powers of two.
    size = min(num, FEW) if few else max(16, min(TENSOR_BATCH, 1 << (num - 1).bit_length()))
    return _Batch(size, pl.cdiv(num, size), few)


def _rows_at_a_time(num_rows: int, num_others: int, strip: int) -> int:
    """Of a block, for a program: fewer where there would be too few programs. strip: 0 if not few.

    num_others: programs that there are for one of this block.
    """
    most, least = (max(4, STEP // strip), 4) if strip else (64, 16)
    tile = math.gcd(num_rows, most)
    while tile > least and num_others * (num_rows // tile) < PROGRAMS:
        tile //= 2
    return tile
