"""Grouped matmul for NVIDIA GPUs (Hopper): Pallas kernels that Triton compiles.

A program of the forward and of the gradient of the rows makes one tile of the result. Tiles begin
where their group begins, so none holds rows of two groups: a group takes ceil(size / block_m)
tiles, at most R / block_m + E + 1 together, and that bound is the grid, whatever the sizes. Which
tile belongs to which group is a table that jnp makes on the device; the host never waits for it.
The rows past the last group are one more group, whose sum is empty: it writes zeros.

A program of the gradient of the matrices owns one tile of one matrix and walks over the group's
rows; no atomics, so the result is the same in every run. A group that is empty or not asked for
has no rows to walk over. The largest groups start first, so that the end of the launch is even.

float32 operands are multiplied as three TF32 products on the tensor cores (TF32x3), which keeps
about 21 bits of each product; bfloat16 and float16 are exact. Sums are float32.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moejax.ops.gpu_tiles import Tile, outer_tile, rows_tile

Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]
MAX_ELEMENTS = 2**31
DTYPES = ("float32", "bfloat16", "float16")
# Programs of this many row tiles run side by side before the next columns, to meet in the L2 cache.
SUPER_ROWS = 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped_matmul_gpu(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    groups: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `moejax.ops.grouped_matmul.grouped_matmul`; interpret=True runs it on any device.

    Raises NotImplementedError for types other than float32, bfloat16 and float16, and for arrays
    of 2^31 elements and more.
    """
    return multiply_rows([(lhs, rhs)], group_sizes, transposed=False, interpret=interpret)


def _forward(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    groups: jax.Array | None,
    interpret: bool,
) -> tuple[jax.Array, Saved]:
    out = multiply_rows([(lhs, rhs)], group_sizes, transposed=False, interpret=interpret)
    return out, (lhs, rhs, group_sizes, groups)


def _backward(
    interpret: bool, saved: Saved, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    lhs, rhs, group_sizes, groups = saved
    d_lhs = multiply_rows([(d_out, rhs)], group_sizes, transposed=True, interpret=interpret)
    d_rhs = outer_by_group(lhs, d_out, group_sizes, groups, interpret=interpret)
    return d_lhs, d_rhs, None, None


grouped_matmul_gpu.defvjp(_forward, _backward)


def multiply_rows(
    pairs: list[tuple[jax.Array, jax.Array]],
    group_sizes: jax.Array,
    *,
    transposed: bool,
    interpret: bool = False,
    tile: Tile | None = None,
) -> jax.Array:
    """The sum over pairs (x [R, K], w [E, K, N]) of each row times its group's matrix: [R, N].

    transposed: w is [E, N, K]. The pairs have one shape and type; rows past the groups give zeros.
    """
    x, w = pairs[0]
    (num_rows, depth), num_cols = x.shape, w.shape[1 if transposed else 2]
    check(x.shape, w.shape, (num_rows, num_cols), dtype=x.dtype)
    if 0 in (num_rows, num_cols, depth, w.shape[0]):
        return jnp.zeros((num_rows, num_cols), x.dtype)
    tile = tile or rows_tile(num_rows, w.shape[0], num_cols, depth, x.dtype.itemsize)
    table = visits(group_sizes, num_rows, tile.m)
    kernel = functools.partial(
        _rows_kernel, num_pairs=len(pairs), transposed=transposed, tile=tile, interpret=interpret
    )
    return pl.pallas_call(
        kernel,
        grid=(table.shape[1] * pl.cdiv(num_cols, tile.n),),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_cols), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="grouped_matmul_dx" if transposed else "grouped_matmul",
    )(table, *(x for x, _ in pairs), *(w for _, w in pairs))


def _rows_kernel(table, *refs, num_pairs, transposed, tile, interpret):  # type: ignore
    out = refs[2 * num_pairs]
    (num_rows, num_cols), depth = out.shape, refs[0].shape[1]
    visit, col_tile = place(table.shape[1], pl.cdiv(num_cols, tile.n))
    group, start, end = table[0, visit], table[1, visit], table[2, visit]
    all_steps = jnp.int32(pl.cdiv(depth, tile.k))
    steps = jnp.where(group < refs[num_pairs].shape[0], all_steps, jnp.int32(0))

    def make(m: int, n: int, whole: bool) -> None:
        # A tile that hangs over the end of the array reads the last row again instead of a mask.
        rows = jnp.minimum(start + jnp.arange(m), num_rows - 1)
        cols = pl.Slice(col_tile * tile.n, n)
        inside_cols = None if whole else span(cols) < num_cols
        total = jnp.zeros((m, n), jnp.float32)
        for x_ref, w_ref in zip(refs[:num_pairs], refs[num_pairs : 2 * num_pairs], strict=True):

            def step(i, total, x_ref=x_ref, w_ref=w_ref):  # type: ignore
                ks = pl.Slice(i * tile.k, tile.k)
                inside_k = within(ks, depth)
                x = load(x_ref.at[rows[:, None], span(ks)[None, :]], across(None, inside_k))
                w = load_matrix(w_ref, group, ks, cols, (inside_k, inside_cols), transposed)
                return total + dot(x, w, (1, 1 if transposed else 0), interpret)

            total = jax.lax.fori_loop(0, steps, step, total)
        store_rows(out, total, (start, end), cols, inside_cols)

    in_halves(make, tile, end - start, col_tile, num_cols)


def in_halves(
    make: Callable[[int, int, bool], None],
    tile: Tile,
    num_rows: jax.Array | None,
    col_tile: jax.Array,
    num_cols: int,
) -> None:
    """make(m, n, whole): a tile, or half of one where that holds all there is, either way.

    num_rows: how many there are from this tile's first on; None: never halved. whole: all n columns
    exist. Only the largest tiles are worth the second program.
    """
    rest, half = num_cols % tile.n, tile.n // 2

    def by_cols(m: int) -> None:
        if tile.n < 256 or rest == 0 or rest > half:
            make(m, tile.n, rest == 0)
            return
        last = num_cols // tile.n
        pl.when(col_tile < last)(lambda: make(m, tile.n, True))
        pl.when(col_tile == last)(lambda: make(m, half, rest == half))

    if num_rows is None or tile.m < 128:
        by_cols(tile.m)
        return
    pl.when(num_rows > tile.m // 2)(lambda: by_cols(tile.m))
    pl.when(num_rows <= tile.m // 2)(lambda: by_cols(tile.m // 2))


def outer_by_group(
    x: jax.Array,
    y: jax.Array,
    group_sizes: jax.Array,
    groups: jax.Array | None,
    *,
    interpret: bool = False,
    tile: Tile | None = None,
) -> jax.Array:
    """Per wanted group, the sum over its rows of x[r] y[r]^T: x [R, K], y [R, N] -> [E, K, N]."""
    (num_rows, k), n, num_groups = x.shape, y.shape[1], group_sizes.shape[0]
    check(x.shape, y.shape, (num_groups, k, n), dtype=x.dtype)
    if 0 in (num_rows, k, n, num_groups):
        return jnp.zeros((num_groups, k, n), x.dtype)
    tile = tile or outer_tile(num_groups, k, n, x.dtype.itemsize)
    num_tiles = num_groups * pl.cdiv(k, tile.m) * pl.cdiv(n, tile.n)
    return pl.pallas_call(
        functools.partial(_outer_kernel, tile=tile, interpret=interpret),
        grid=(num_tiles,),
        out_shape=jax.ShapeDtypeStruct((num_groups, k, n), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="grouped_matmul_dw",
    )(wanted_spans(group_sizes, groups, num_rows), x, y)


def _outer_kernel(table, x_ref, y_ref, out, *, tile, interpret):  # type: ignore
    _, num_k, num_n = out.shape
    k_tiles, n_tiles = pl.cdiv(num_k, tile.m), pl.cdiv(num_n, tile.n)
    visit = pl.program_id(0) // (k_tiles * n_tiles)
    group, start, end = table[0, visit], table[1, visit], table[2, visit]
    within_group = pl.program_id(0) % (k_tiles * n_tiles)
    ks = pl.Slice(within_group // n_tiles * tile.m, tile.m)
    inside_k = within(ks, num_k)

    def make(m: int, n: int, whole: bool) -> None:
        cols = pl.Slice(within_group % n_tiles * tile.n, n)
        inside_cols = None if whole else span(cols) < num_n

        def step(i, total):  # type: ignore
            rows = start + i * tile.k + jnp.arange(tile.k)
            mine = rows < end  # both are masked: zero times another's NaN would be NaN
            x = load(x_ref.at[rows[:, None], span(ks)[None, :]], across(mine, inside_k))
            y = load(y_ref.at[rows[:, None], span(cols)[None, :]], across(mine, inside_cols))
            return total + dot(x, y, (0, 0), interpret)

        total = jnp.zeros((m, n), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(end - start, tile.k), step, total)
        mask = across(inside_k, inside_cols)
        plgpu.store(out.at[group, ks, cols], total.astype(out.dtype), mask=mask)

    in_halves(make, tile, None, within_group % n_tiles, num_n)


def visits(group_sizes: jax.Array, num_rows: int, block: int) -> jax.Array:
    """Group, first row and group's end of every tile of rows: int32 [3, tiles], tiles static.

    Group E stands for the rows past the last group; unused tiles at the end have no rows.
    """
    num_groups = group_sizes.shape[0]
    ends = jnp.minimum(jnp.cumsum(group_sizes), num_rows)
    ends = jnp.concatenate([ends, jnp.full(1, num_rows, ends.dtype)]).astype(jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    last_tile = jnp.cumsum(pl.cdiv(ends - starts, block))
    # Every group but the full tiles adds at most one: floor((R + (E + 1)(block - 1)) / block).
    tile = jnp.arange((num_rows + (num_groups + 1) * (block - 1)) // block, dtype=jnp.int32)
    group = jnp.searchsorted(last_tile, tile, side="right", method="compare_all")
    group = jnp.minimum(group, num_groups).astype(jnp.int32)
    first_tile = last_tile[group] - pl.cdiv(ends - starts, block)[group]
    start = jnp.minimum(starts[group] + (tile - first_tile) * block, ends[group])
    return jnp.stack([group, start.astype(jnp.int32), ends[group]])


def wanted_spans(group_sizes: jax.Array, groups: jax.Array | None, num_rows: int) -> jax.Array:
    """Group, first row and end, most rows first, unwanted groups empty: int32 [3, E]."""
    ends = jnp.minimum(jnp.cumsum(group_sizes), num_rows)
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    if groups is not None:
        ends = jnp.where(groups, ends, starts)
    order = jnp.argsort(starts - ends)
    return jnp.stack([order, starts[order], ends[order]]).astype(jnp.int32)


def place(num_visits: int, col_tiles: int) -> tuple[jax.Array, jax.Array]:
    """This program's tile of rows and of columns: SUPER_ROWS row tiles, then the next column."""
    program = pl.program_id(0)
    first = program // (SUPER_ROWS * col_tiles) * SUPER_ROWS
    rows_here = jnp.minimum(num_visits - first, SUPER_ROWS)
    rest = program - first * col_tiles
    return first + rest % rows_here, rest // rows_here


def span(ds: pl.Slice) -> jax.Array:
    return ds.start + jnp.arange(ds.size)


def within(ds: pl.Slice, size: int) -> jax.Array | None:
    """Which of the positions exist; None where the tile divides the size and all do."""
    return None if size % ds.size == 0 else span(ds) < size


def across(rows: jax.Array | None, cols: jax.Array | None) -> jax.Array | None:
    """The mask of a tile whose rows and columns are masked so."""
    if rows is None:
        return None if cols is None else cols[None, :]
    return rows[:, None] if cols is None else rows[:, None] & cols[None, :]


def load(ref, mask: jax.Array | None) -> jax.Array:  # type: ignore
    if mask is None:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=0)


def load_matrix(w_ref, group, ks, cols, inside, transposed):  # type: ignore
    inside_k, inside_cols = inside
    group = jnp.minimum(group, w_ref.shape[0] - 1)
    if transposed:
        return load(w_ref.at[group, cols, ks], across(inside_cols, inside_k))
    return load(w_ref.at[group, ks, cols], across(inside_k, inside_cols))


def store_rows(out, total, start_end, cols, inside_cols):  # type: ignore
    start, end = start_end
    rows = start + jnp.arange(total.shape[0])
    mask = across(rows < end, inside_cols)
    assert mask is not None
    mask = jnp.broadcast_to(mask, total.shape)
    ref = out.at[rows[:, None], span(cols)[None, :]]
    plgpu.store(ref, total.astype(out.dtype), mask=mask)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], interpret: bool) -> jax.Array:
    """a and b summed over one dim of each, in float32; see the module for float32 operands."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    if a.dtype != jnp.float32:
        return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
    # XLA's CPU, which the interpreter runs on, has plain float32 only.
    precision = "highest" if interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def check(*shapes: tuple[int, ...], dtype: jnp.dtype) -> None:
    """Raises NotImplementedError for what the kernels cannot multiply or cannot address."""
    if dtype.name not in DTYPES:
        raise NotImplementedError(
            f"The gpu kernels multiply {', '.join(DTYPES)}, not {dtype}: cast the operands, "
            "or take implementation='ragged_dot'."
        )
    for shape in shapes:  # Pallas Triton computes an element's offset in int32
        if math.prod(shape) >= MAX_ELEMENTS:
            raise NotImplementedError(
                f"The gpu kernels address fewer than {MAX_ELEMENTS} elements of an array, and "
                f"{list(shape)} has {math.prod(shape)}: shard the rows or the groups over devices, "
                "or take implementation='ragged_dot'."
            )
