"""Grouped matmul for TPUs: Pallas kernels that Mosaic compiles.

Rows are cut into tiles of equal height; a visit multiplies one tile by the matrix of one group, and
a tile that two groups share is visited by both, each of which writes its own rows only. The list of
visits is made by jnp on the device from the group sizes and prefetched into scalar memory, so the
host never waits. Consecutive visits of a group keep its matrix in VMEM. An empty group has no
visit; rows past the groups are one more group, whose visits write zeros.

Visits are split in two halves of equal length by whole row tiles, one for each core of a v4 or
v5p; a chip with one core does them in turn. The gradient of the matrices splits its output instead.

K and N need be no multiple of a tile: what a block reads past the end reaches no output. Written
for v5e, v5p and v6e, compiled for them ahead of time and checked in the TPU interpreter; it has not
run on a TPU yet.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]
DTYPES = ("float32", "bfloat16")
_LANES = 128
# What blocks, twice each, and sums may take; Mosaic's own temporaries come on top of it.
BLOCK_BYTES = 24 << 20
_VMEM_LIMIT_BYTES = 48 << 20


class Tiles(NamedTuple):
    """Rows and columns of a block; columns are those of the output."""

    rows: int = 256
    columns: int = 512


class Visits(NamedTuple):
    """group and row_tile [cores, V], num [cores] of them real; starts and ends of groups [E]."""

    group: jax.Array
    row_tile: jax.Array
    num: jax.Array
    starts: jax.Array
    ends: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def grouped_matmul_tpu(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    groups: jax.Array | None = None,
    interpret: bool | pltpu.InterpretParams = False,
    tiles: Tiles = Tiles(),
) -> jax.Array:
    """See `moejax.ops.grouped_matmul.grouped_matmul`; InterpretParams run it on any device.

    Raises NotImplementedError for types other than float32 and bfloat16, and for rows so long that
    one block of them and one of a matrix do not fit VMEM.
    """
    return _rows(lhs, rhs, group_sizes, tiles, interpret, transposed=False)


def _forward(lhs, rhs, group_sizes, groups, interpret, tiles) -> tuple[jax.Array, Saved]:
    out = _rows(lhs, rhs, group_sizes, tiles, interpret, transposed=False)
    return out, (lhs, rhs, group_sizes, groups)


def _backward(interpret, tiles, saved: Saved, d_out: jax.Array):
    lhs, rhs, group_sizes, groups = saved
    d_lhs = _rows(d_out, rhs, group_sizes, tiles, interpret, transposed=True)
    d_rhs = _outer(lhs, d_out, group_sizes, groups, tiles, interpret)
    return d_lhs, d_rhs, None, None


grouped_matmul_tpu.defvjp(_forward, _backward)


def row_visits(group_sizes: jax.Array, num_rows: int, tile: int) -> Visits:
    """Which group meets which row tile, in order; a tile belongs to one core.

    The last group is that of the rows past all others.
    """
    past = num_rows - jnp.sum(group_sizes, keepdims=True)
    sizes = jnp.concatenate([group_sizes, past]).astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    num_tiles = pl.cdiv(num_rows, tile)
    first, count = _tiles_of(starts, ends, tile)
    last = jnp.cumsum(count)
    v = jnp.arange(num_tiles + sizes.size - 1, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(last, v, side="right"), sizes.size - 1)
    row_tile = jnp.where(v < last[-1], first[group] + v - (last - count)[group], num_tiles)
    cuts = [jnp.int32(0), last[-1]]
    if num_tiles > 1:  # each core owns at least one tile, so none points at the other's output
        middle = jnp.clip(row_tile[last[-2] // 2], 1, num_tiles - 1)
        cuts.insert(1, jnp.searchsorted(row_tile, middle))
    bounds = jnp.stack([cut.astype(jnp.int32) for cut in cuts])
    low, high = bounds[:-1, None], bounds[1:, None]
    at = jnp.minimum(low + v, high - 1)
    return Visits(group[at].astype(jnp.int32), row_tile[at], (high - low)[:, 0], starts, ends)


def outer_visits(
    group_sizes: jax.Array, groups: jax.Array | None, num_rows: int, tile: int
) -> Visits:
    """Which row tiles the gradient of each matrix sums; a group without any is visited once.

    That visit writes zeros. A group that is not asked for (`groups` false) has no rows here.
    """
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    starts = ends - group_sizes.astype(jnp.int32)
    if groups is not None:
        ends = jnp.where(groups, ends, starts)
    first, count = _tiles_of(starts, ends, tile)
    count = jnp.maximum(count, 1)
    last = jnp.cumsum(count)
    num_tiles = pl.cdiv(num_rows, tile)
    v = jnp.arange(num_tiles + group_sizes.size, dtype=jnp.int32)
    v = jnp.minimum(v, last[-1] - 1)
    group = jnp.searchsorted(last, v, side="right").astype(jnp.int32)
    row_tile = jnp.minimum(first[group] + v - (last - count)[group], num_tiles - 1)
    return Visits(group[None], row_tile[None].astype(jnp.int32), last[-1:], starts, ends)


def _tiles_of(starts: jax.Array, ends: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
    """The first row tile of each group, and how many it touches."""
    first = starts // tile
    return first, jnp.where(ends > starts, (ends - 1) // tile - first + 1, 0)


def _inside(visits: tuple, group, row_tile, shape: tuple[int, int]) -> jax.Array:
    """Which rows of a tile lie in the group."""
    starts, ends = visits
    row = row_tile * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= starts[group]) & (row < ends[group])


def _dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _rows_kernel(group, row_tile, num, starts, ends, lhs, rhs, out, *, transposed: bool):
    core, v = pl.program_id(0), pl.program_id(2)
    g, t = group[core, v], row_tile[core, v]

    @pl.when(v < num[core])
    def _():
        @pl.when((v == 0) | (row_tile[core, jnp.maximum(v - 1, 0)] != t))
        def _():
            out[...] = jnp.zeros_like(out)

        @pl.when(g < starts.shape[0] - 1)
        def _():
            product = _dot(lhs[...], rhs[...], (1, 1 if transposed else 0))
            kept = out[...].astype(jnp.float32)
            mask = _inside((starts, ends), g, t, out.shape)
            out[...] = jnp.where(mask, product, kept).astype(out.dtype)


def _rows(lhs, rhs, group_sizes, tiles: Tiles, interpret, *, transposed: bool) -> jax.Array:
    """out[r] = lhs[r] @ rhs[e], or @ rhs[e].T, of row r in group e: [R, K] -> [R, N]."""
    num_rows, k = lhs.shape
    num_groups, n = rhs.shape[0], rhs.shape[1 if transposed else 2]
    if not num_rows or not num_groups:
        return jnp.zeros((num_rows, n), lhs.dtype)
    tiles = _fitting(tiles, k, lhs.dtype)
    columns = min(tiles.columns, n)
    visits = row_visits(group_sizes, num_rows, tiles.rows)
    block = (None, columns, k) if transposed else (None, k, columns)

    def matrix(c, j, v, group, *_):
        e = jnp.minimum(group[c, v], num_groups - 1)
        return (e, j, 0) if transposed else (e, 0, j)

    return pl.pallas_call(
        functools.partial(_rows_kernel, transposed=transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(visits.num.size, pl.cdiv(n, columns), visits.group.shape[1]),
            in_specs=[
                pl.BlockSpec((tiles.rows, k), lambda c, j, v, group, tile, *_: (tile[c, v], 0)),
                pl.BlockSpec(block, matrix),
            ],
            out_specs=pl.BlockSpec(
                (tiles.rows, columns), lambda c, j, v, group, tile, *_: (tile[c, v], j)
            ),
        ),
        out_shape=jax.ShapeDtypeStruct((num_rows, n), lhs.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM_LIMIT_BYTES,
        ),
        interpret=interpret,
        name="grouped_matmul_dx" if transposed else "grouped_matmul",
    )(*visits, lhs, rhs)


def _outer_kernel(group, row_tile, num, starts, ends, lhs, d_out, out, total):
    v = pl.program_id(2)
    g, t = group[0, v], row_tile[0, v]

    @pl.when(v < num[0])
    def _():
        @pl.when((v == 0) | (group[0, jnp.maximum(v - 1, 0)] != g))
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when(ends[g] > starts[g])
        def _():
            # Both are masked: what lies past the last row may be anything, NaN too.
            rows, grads = (
                jnp.where(_inside((starts, ends), g, t, x.shape), x[...], jnp.zeros_like(x[...]))
                for x in (lhs, d_out)
            )
            total[...] += _dot(rows, grads, (0, 0))

        @pl.when((v == num[0] - 1) | (group[0, jnp.minimum(v + 1, group.shape[1] - 1)] != g))
        def _():
            out[...] = total[...].astype(out.dtype)


def _outer(lhs, d_out, group_sizes, groups, tiles: Tiles, interpret) -> jax.Array:
    """d_rhs[e] = sum over rows r of group e of lhs[r]^T d_out[r]: [R, K], [R, N] -> [E, K, N]."""
    (num_rows, k), n, num_groups = lhs.shape, d_out.shape[1], group_sizes.size
    if not num_rows or not num_groups:
        return jnp.zeros((num_groups, k, n), lhs.dtype)
    _fitting(tiles, _LANES, lhs.dtype)
    tile_k, tile_n = min(tiles.columns, k), min(tiles.columns, n)
    visits = outer_visits(group_sizes, groups, num_rows, tiles.rows)
    return pl.pallas_call(
        _outer_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(k, tile_k), pl.cdiv(n, tile_n), visits.group.shape[1]),
            in_specs=[
                pl.BlockSpec((tiles.rows, tile_k), lambda i, j, v, group, t, *_: (t[0, v], i)),
                pl.BlockSpec((tiles.rows, tile_n), lambda i, j, v, group, t, *_: (t[0, v], j)),
            ],
            out_specs=pl.BlockSpec(
                (None, tile_k, tile_n), lambda i, j, v, group, *_: (group[0, v], i, j)
            ),
            scratch_shapes=[pltpu.VMEM((tile_k, tile_n), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((num_groups, k, n), lhs.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM_LIMIT_BYTES,
        ),
        interpret=interpret,
        name="grouped_matmul_dw",
    )(*visits, lhs, d_out)


def _fitting(tiles: Tiles, depth: int, dtype) -> Tiles:
    """Tiles whose blocks, twice each, fit VMEM with `depth` columns of rows in one block."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        raise NotImplementedError(
            f"grouped_matmul on a TPU takes {' and '.join(DTYPES)}, not {dtype}: cast the operands."
        )
    rows, columns = tiles
    while True:
        blocks = 2 * dtype.itemsize * (rows * depth + depth * columns + rows * columns)
        if blocks + 8 * rows * columns <= BLOCK_BYTES:
            return Tiles(rows, columns)
        if columns > _LANES:
            columns = max(_LANES, columns // 2)
        elif rows > _LANES:
            rows = max(_LANES, rows // 2)
        else:
            raise NotImplementedError(
                f"grouped_matmul on a TPU: rows of {depth} {dtype} need {blocks >> 20} MiB of VMEM "
                f"and {BLOCK_BYTES >> 20} are used: take implementation='ragged_dot'."
            )
