"""The TPU kernel of the gradient of the matrices: per group, rows^T times rows.

Each core owns half of every matrix and goes through the groups' visits (`tpu_visits`) once per
tile. A visit sums as many rows as its height has; a matrix unit sums 128 at a time, so heights are
multiples of that. All but the last visit of a group add to a float32 sum in VMEM, the last one
writes that and its own product as the result. Groups that are not asked for are visited once, to
write zeros. Given a sum of earlier rows, the result is added to it where it lies; told that there
were none, it reads a few tiles of what lies there and ignores them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.ops.group_sizes import GroupSizes, plain
from moejax.ops.tpu_rows import blocked, cost, dot, in_hbm, kind_is, steps, when
from moejax.ops.tpu_tables import table_for
from moejax.ops.tpu_tiles import OuterTiles
from moejax.ops.tpu_visits import BLOCK, Reader, Table, Wanted, fitted


@functools.partial(jax.jit, static_argnames=("tiles", "interpret", "out_dtype"))
def outer(
    lhs: jax.Array,
    d_out: jax.Array,
    group_sizes: GroupSizes,
    groups: jax.Array | None,
    tiles: OuterTiles,
    interpret: Any = False,
    out_dtype: Any = None,
    before: jax.Array | None = None,
    begins: jax.Array | bool | None = None,
) -> jax.Array:
    """out[e] = sum over rows r of group e of lhs[r]^T d_out[r]: [R, K], [R, N] -> [E, K, N].

    out_dtype: the operands' if None. before [E, K, N], of out_dtype: what is added to, unless
    `begins`, a bool, is true.
    """
    (num_rows, k), n = lhs.shape, d_out.shape[1]
    rows, heights = fitted(num_rows, tiles.heights)
    tiles = tiles._replace(heights=heights)
    table = table_for(group_sizes, groups, Wanted(True, rows, heights), interpret)
    operands = (
        blocked(lhs, rows, -(-k // tiles.k) * tiles.k),
        blocked(d_out, rows, -(-n // tiles.n) * tiles.n),
    )
    out_dtype = out_dtype or lhs.dtype
    sums = None
    if before is not None:
        filling = (0, operands[0].shape[2] - k), (0, operands[1].shape[2] - n)
        fresh = False if begins is None else begins
        sums = jnp.pad(before, ((0, 0), *filling)), jnp.asarray(fresh, jnp.int32).reshape(1)
    num_groups = plain(group_sizes).size
    out = call(*operands, table, num_groups, tiles, interpret, None, out_dtype, sums)
    return out[:, :k, :n]


def call(
    lhs: jax.Array,
    d_out: jax.Array,
    table: Table,
    num_groups: int,
    tiles: OuterTiles,
    interpret: Any = False,
    known: int | None = None,
    out_dtype: Any = None,
    before: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """The kernel on blocked rows [R / 16, 16, K] and [R / 16, 16, N]; K and N are whole tiles.

    known: the kind of every visit, for a kernel whose cycles a compiler can count, or None; one
    past the heights for the first of a group's visits, two past them for a later one but the last.
    before: what is added to, and int32 [1], not 0 where that is nothing yet.
    """
    k, n = lhs.shape[2], d_out.shape[2]
    tallest = tiles.heights[0] // BLOCK
    out_shape = jax.ShapeDtypeStruct((num_groups, k, n), out_dtype or lhs.dtype)
    added = [] if before is None else [before[0]]
    scalars = [table.numbers] if before is None else [table.numbers, before[1]]
    scalars = [in_hbm(numbers, interpret) for numbers in scalars]

    def place(i, j):  # the first dimension of the grid is that which the cores share
        return (i, j) if tiles.cores_split == "k" else (j, i)

    def lhs_index(i, j, v, numbers, *_):
        return Reader(numbers, 1).fetch(0, v), 0, pl.multiple_of(place(i, j)[0] * tiles.k, 128)

    def d_out_index(i, j, v, numbers, *_):
        return Reader(numbers, 1).fetch(0, v), 0, pl.multiple_of(place(i, j)[1] * tiles.n, 128)

    def out_index(i, j, v, numbers, *_):
        return Reader(numbers, 1).group(0, v), *place(i, j)

    def before_index(i, j, v, numbers, begins):
        # One tile is fetched for all of a core's visits before it writes there.
        fresh, group = begins[0] != 0, Reader(numbers, 1).group(0, v)
        return jnp.where(fresh, 0, group), *place(i, jnp.where(fresh, 0, j))

    out_spec, before_spec = (
        pl.BlockSpec((None, tiles.k, tiles.n), index) for index in (out_index, before_index)
    )
    return pl.pallas_call(
        functools.partial(_kernel, heights=tiles.heights, known=known, adds=bool(added)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(*place(k // tiles.k, n // tiles.n), steps(table, known)),
            in_specs=[
                pl.BlockSpec(tuple(map(pl.Element, (tallest, BLOCK, tiles.k))), lhs_index),
                pl.BlockSpec(tuple(map(pl.Element, (tallest, BLOCK, tiles.n))), d_out_index),
            ]
            + [before_spec] * len(added),
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM((tiles.k, tiles.n), jnp.float32)],
        ),
        out_shape=out_shape,
        input_output_aliases={len(scalars) + 2: 0} if added else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_bytes,
        ),
        cost_estimate=cost([lhs, d_out, *added], [out_shape], [lhs.shape[0] * BLOCK * k * n]),
        interpret=interpret,
        name="grouped_matmul_dw",
    )(*scalars, lhs, d_out, *added)


def _kernel(*refs, heights, known, adds):
    table, refs = Reader(refs[0], 1), refs[1:]
    if adds:
        fresh, lhs, d_out, before, out, total = refs
    else:
        lhs, d_out, out, total = refs
    v = pl.program_id(2)
    now = table.visit(0, v)
    kind, computed = now.kind, now.fetch + now.skip
    begin = (computed + now.lead) * BLOCK
    # Rows in [start, end) of those computed count: the group's own, and each only once.
    start = jnp.maximum(now.start, begin) - computed * BLOCK
    end = jnp.minimum(now.end, begin + now.owned * BLOCK) - computed * BLOCK
    is_first = (v == 0) | (table.group(0, jnp.maximum(v - 1, 0)) != now.group)

    def summed(height):
        row = jax.lax.broadcasted_iota(jnp.int32, (height, 1), 0)
        inside = (row >= start) & (row < end)

        def rows(ref):  # both are masked: another group's NaN times zero would be NaN
            x = ref[pl.ds(now.skip, height // BLOCK)].reshape(height, ref.shape[2])
            return jnp.where(inside, x, jnp.zeros_like(x))

        return dot(rows(lhs), rows(d_out), (0, 0))

    def earlier():
        return jnp.where(fresh[0] != 0, 0.0, before[...])

    for i, height in enumerate(heights):

        @kind_is(kind, i, known)
        def _(height=height):
            product = summed(height)
            whole = jnp.where(is_first, 0.0, total[...]) + product
            if adds:
                whole += earlier()
            out[...] = whole.astype(out.dtype)

    def knows(which):
        return None if known is None else known == which

    # Two bodies: a choice in a sum that is read and written where it lies would be a second pass.
    @when((kind == len(heights)) & is_first, knows(len(heights)))
    def _():
        total[...] = summed(heights[0])

    @when((kind == len(heights)) & ~is_first, knows(len(heights) + 1))
    def _():
        total[...] += summed(heights[0])

    @when(kind == len(heights) + 1, knows(len(heights) + 2))
    def _():
        out[...] = earlier() if adds else jnp.zeros_like(out)
