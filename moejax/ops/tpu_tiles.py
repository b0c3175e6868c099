"""Tile sizes of the grouped TPU kernels: one model of VMEM and of the matrix units for them all.

A tile of the result holds as many columns as fit VMEM beside what is fetched meanwhile (twice each,
one in use and one under way), so that rows are read as seldom as possible and a matrix once per
group and core. A visit's product is unrolled by the compiler, which bounds it too. A visit costs
about 400 cycles beyond its products; what was counted on compiled kernels stands in BUILD.md.
"""

import functools
import itertools
from typing import NamedTuple

import jax.numpy as jnp

LANES = 128
DTYPES = ("float32", "bfloat16")
# What a kernel reserves of a core's VMEM: seven eighths of a v5p's 64 MiB. A v5e and a v6e have
# 128, which changes no tile of 2,048 x 1,408, and in what is left XLA keeps operands.
VMEM_BYTES = 56 << 20
# Multiplications of one visit: the more, the longer compilers take.
MAX_UNROLLED = 3 << 29
# Rows of a group from which on its rest matters little: fewer heights, and less code to compile.
LARGE_GROUP = 2048
MAX_OUTER_TILE = 1024 * 1408
VISIT_CYCLES, UNIT_CYCLES = 450, 64


class Tiles(NamedTuple):
    """heights: rows that a visit may have, falling. columns: of a tile of the result."""

    heights: tuple[int, ...]
    columns: int
    vmem_bytes: int


class OuterTiles(NamedTuple):
    """Rows a visit sums, and k x n of a tile of a matrix; the cores share the tiles of one dim."""

    heights: tuple[int, ...]
    k: int
    n: int
    cores_split: str
    vmem_bytes: int


class Operands(NamedTuple):
    """How many arrays of rows, matrices, products and results a visit has."""

    xs: int = 1
    ws: int = 1
    products: int = 1
    outs: int = 1


def rows_tiles(
    rows_per_group: int, depth: int, columns: int, dtype: jnp.dtype, count: Operands = Operands()
) -> Tiles:
    """For rows [R, depth] times matrices [E, depth, columns].

    Raises NotImplementedError for a type other than float32 and bfloat16, and when not even the
    least tile fits.
    """
    dtype = checked(dtype)
    most, passes = VMEM_BYTES, 6 if dtype.itemsize == 4 else 1
    width = _units(columns)
    tall = (256, 64, 32) if rows_per_group >= LARGE_GROUP else (256, 128, 96, 64, 32)
    for heights in (tall, (128, 96, 64, 32), (64, 32), (32,)):
        if heights[0] == 256 and rows_per_group <= 128:
            continue
        tallest = heights[0]
        fixed = 2 * dtype.itemsize * count.xs * tallest * depth
        each = 2 * dtype.itemsize * (count.ws * depth + count.outs * tallest)
        each = (each + 4 * count.products * tallest) * LANES
        fit = (most - fixed) // each
        unrolled = MAX_UNROLLED // (tallest * depth * count.products * passes * LANES)
        if fit >= min(width, 4) or (fit > 0 and tallest == 32):
            num_tiles = -(-width // max(1, min(fit, unrolled)))
            return Tiles(heights, -(-width // num_tiles) * LANES, most)
    raise NotImplementedError(
        f"grouped_matmul on a TPU: rows of {depth} {dtype} need {fixed + each >> 20} MiB of VMEM "
        f"and {most >> 20} are used: take implementation='ragged_dot'."
    )


@functools.lru_cache
def outer_tiles(k: int, n: int, dtype: jnp.dtype, added: bool = False) -> OuterTiles:
    """For the sums of products of rows [R, k]^T and [R, n]; raises as `rows_tiles` does.

    added: whether they are added to float32 sums, which are read and written instead of the dtype.
    The cheapest tiles that fit: products of what fills the last tiles count, and so does a core
    that waits because the number of tiles is odd.
    """
    dtype = checked(dtype)
    most, heights = VMEM_BYTES, (384, 256, 128)
    best = None
    each = 8 + (2 * 2 * 4 if added else 2 * dtype.itemsize)
    for num_k, num_n in itertools.product(range(1, 65), repeat=2):
        unit_k, unit_n = -(-_units(k) // num_k), -(-_units(n) // num_n)
        area = unit_k * unit_n * LANES * LANES
        fetched = 2 * dtype.itemsize * heights[0] * (unit_k + unit_n) * LANES
        if area > MAX_OUTER_TILE or fetched + area * each > most:
            continue
        visit = unit_k * unit_n * UNIT_CYCLES + VISIT_CYCLES  # of 256 rows
        for split in ("k", "n"):
            shared, other = (num_k, num_n) if split == "k" else (num_n, num_k)
            cost = (-(-shared // 2) * other * visit, num_k * num_n, split)
            if best is None or cost < best[0]:
                best = (cost, unit_k * LANES, unit_n * LANES, split)
    if best is None:
        raise NotImplementedError(
            f"grouped_matmul on a TPU: matrices of {k} x {n} {dtype} are too large for 64 x 64 "
            "tiles: take implementation='ragged_dot'."
        )
    return OuterTiles(heights, *best[1:], most)


def checked(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype, if the kernels multiply it."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        raise NotImplementedError(
            f"grouped_matmul on a TPU takes {' and '.join(DTYPES)}, not {dtype}: cast the operands."
        )
    return dtype


def _units(columns: int) -> int:
    return max(1, -(-columns // LANES))
