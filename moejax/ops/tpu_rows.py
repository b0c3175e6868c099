"""The TPU kernel that multiplies rows by their group's matrix, in its three forms.

A core goes through its visits (`tpu_visits`) once per tile of columns. Pallas fetches the rows and
the matrix of the next visit during this one; the matrix stays where it is while the group does. The
result is sent to HBM by the kernel itself, exactly the blocks that the visit owns, and while the
next one is computed. Two groups may share a block of 16 rows: the later one keeps the other's rows,
which still lie in VMEM, and writes the block again after the first write has ended. Cores share no
block.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.ops.group_sizes import GroupSizes
from moejax.ops.tpu_tables import table_for
from moejax.ops.tpu_tiles import LANES, Tiles
from moejax.ops.tpu_visits import BLOCK, NUM_CORES, Reader, Table, Wanted, fitted

Interpret = Any  # bool or pltpu.InterpretParams


class Form(NamedTuple):
    """What a visit computes: results [h, columns] in float32 from products of rows and matrices.

    pairs: (place of the rows, place of the matrix) of each product. combine: products -> results.
    transposed: the matrices are [E, N, K].
    """

    name: str
    pairs: tuple[tuple[int, int], ...]
    combine: Callable[..., Sequence[jax.Array]]
    num_outs: int
    transposed: bool = False


@functools.partial(jax.jit, static_argnames=("form", "tiles", "interpret"))
def multiply(
    form: Form,
    xs: Sequence[jax.Array],
    ws: Sequence[jax.Array],
    group_sizes: GroupSizes,
    tiles: Tiles,
    interpret: Interpret = False,
) -> list[jax.Array]:
    """The form's results [R, N] for rows xs [R, K] and matrices ws [E, K, N]; zeros past groups.

    Jitted, so that a layer that calls it many times traces the kernel once for each shape.
    """
    num_rows = xs[0].shape[0]
    rows, heights = fitted(num_rows, tiles.heights)
    tiles = tiles._replace(heights=heights)
    table = table_for(group_sizes, None, Wanted(False, rows, heights), interpret)
    blocks = [blocked(x, rows, x.shape[1]) for x in xs]
    outs = call(form, blocks, ws, table, tiles, interpret)
    columns = ws[0].shape[1 if form.transposed else 2]
    return [out.reshape(rows, out.shape[2])[:num_rows, :columns] for out in outs]


def call(
    form: Form,
    xs: Sequence[jax.Array],
    ws: Sequence[jax.Array],
    table: Table,
    tiles: Tiles,
    interpret: Interpret = False,
    known: int | None = None,
) -> list[jax.Array]:
    """The kernel on blocked rows [R / 16, 16, K], for the given visits: [R / 16, 16, N].

    known: the kind of every visit, for a kernel whose cycles a compiler can count; else None.
    """
    num_blocks, _, depth = xs[0].shape
    width = -(-ws[0].shape[1 if form.transposed else 2] // LANES) * LANES
    tile = min(tiles.columns, width)
    tallest = tiles.heights[0] // BLOCK
    w_block = (None, tile, depth) if form.transposed else (None, depth, tile)
    last_group = ws[0].shape[0] - 1
    products = [num_blocks * BLOCK * depth * width] * len(form.pairs)
    out_shape = [jax.ShapeDtypeStruct((num_blocks, BLOCK, width), xs[0].dtype)] * form.num_outs

    def x_index(c, j, v, numbers):
        return Reader(numbers, NUM_CORES).fetch(c, v), 0, 0

    def w_index(c, j, v, numbers):
        e = jnp.minimum(Reader(numbers, NUM_CORES).group(c, v), last_group)
        return (e, j, 0) if form.transposed else (e, 0, j)

    x_block = tuple(pl.Element(size) for size in (tallest, BLOCK, depth))
    return pl.pallas_call(
        functools.partial(_kernel, form=form, heights=tiles.heights, width=width, known=known),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(NUM_CORES, pl.cdiv(width, tile), steps(table, known)),
            in_specs=[pl.BlockSpec(x_block, x_index) for _ in xs]
            + [pl.BlockSpec(w_block, w_index) for _ in ws],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * form.num_outs,
            scratch_shapes=[
                pltpu.VMEM((form.num_outs, 2, tallest, BLOCK, tile), xs[0].dtype),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_bytes,
        ),
        cost_estimate=cost([*xs, *ws], out_shape, products),
        interpret=interpret,
        name=form.name,
    )(in_hbm(table.numbers, interpret), *xs, *ws)


def steps(table: Table, known: int | None) -> jax.Array | int:
    """Of the grid; a constant where all visits are known."""
    return table.most.reshape(()) if known is None else table.numbers.shape[1]


def in_hbm(numbers: jax.Array, interpret: Interpret) -> jax.Array:
    """Kept there, where XLA would choose: a kernel is compiled for each memory that it chooses."""
    return numbers if interpret else pltpu.with_memory_space_constraint(numbers, pltpu.HBM)


def cost(
    operands: Sequence[jax.Array], outs: Sequence[jax.ShapeDtypeStruct], products: Sequence[int]
) -> pl.CostEstimate:
    """What XLA's scheduler is told, so that it puts a kernel beside exchanges that it can hide.

    operands: read once each. outs: written once each. products: the multiply-adds of each matrix
    product.
    """
    arrays: list[Any] = [*operands, *outs]
    moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
    return pl.CostEstimate(flops=2 * sum(products), bytes_accessed=moved, transcendentals=0)


def blocked(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """[R, K] as [rows / 16, 16, columns]: no copy unless there is something to fill with zeros."""
    if x.shape != (rows, columns):
        x = jnp.pad(x, ((0, rows - x.shape[0]), (0, columns - x.shape[1])))
    return x.reshape(rows // BLOCK, BLOCK, columns)


def when(condition: jax.Array, known: bool | None) -> Callable[[Callable[[], None]], None]:
    """`pl.when`; where it is known whether the condition holds, no branch: all or nothing."""
    if known is None:
        return pl.when(condition)
    return (lambda body: body()) if known else (lambda body: None)


def kind_is(kind: jax.Array, wanted: int, known: int | None) -> Callable[..., None]:
    """`when(kind == wanted)`, if `known` is None or the kind of all visits."""
    return when(kind == wanted, None if known is None else known == wanted)


def dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """a and b summed over one dim of each, in float32; float32 operands at full precision."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _kernel(*refs, form, heights, width, known):
    table, refs = Reader(refs[0], NUM_CORES), refs[1:]
    num_xs = 1 + max(i for i, _ in form.pairs)
    xs, ws = refs[:num_xs], refs[num_xs : -form.num_outs - 2]
    outs, (done, sem) = refs[-form.num_outs - 2 : -2], refs[-2:]
    core, j, v = (pl.program_id(i) for i in range(3))
    num = table.num(core)
    step = j * num + v
    slot = jax.lax.rem(step, 2)

    @when(v < num, None if known is None else True)
    def _():
        now = table.visit(core, v)
        for i, height in enumerate(heights):
            kind_is(now.kind, i, known)(
                functools.partial(_compute, form, xs, ws, done.at[:, slot], now.skip, height)
            )

        @kind_is(now.kind, len(heights), known)
        def _():
            done[:, slot] = jnp.zeros_like(done[:, slot])

        # The visit before this one; before the first of a tile of columns, the last of the other.
        u = jnp.where(v == 0, num, v) - 1
        before = table.visit(core, u)
        begin = (now.fetch + now.skip + now.lead) * BLOCK
        own = (now.start - begin, now.end - begin)
        _mend_edges(done, slot, before, now, own)

        def send(action, visit, j, slot):
            for at, out in enumerate(outs):
                _send(action, done.at[at, slot], out, sem, visit, j, heights, width, known)

        @pl.when(step > 0)
        def _():
            send("wait", before, jnp.where(v == 0, j - 1, j), 1 - slot)

        send("start", now, j, slot)

        @pl.when(step == pl.num_programs(1) * num - 1)
        def _():
            send("wait", now, j, slot)


def _compute(form, xs, ws, done, skipped, height):
    blocks = height // BLOCK
    rows = [x[pl.ds(skipped, blocks)].reshape(height, x.shape[2]) for x in xs]
    contracted = (1, 1 if form.transposed else 0)
    products = [dot(rows[i], ws[k][...], contracted) for i, k in form.pairs]
    for at, result in enumerate(form.combine(*products)):
        done[at, :blocks] = result.astype(done.dtype).reshape(blocks, BLOCK, result.shape[1])


def _mend_edges(done, slot, before, now, own):
    """Rows of an earlier group in the first block come from the visit before; none past the own."""
    start, end = own
    theirs = jnp.maximum(before.lead + before.owned - 1, 0)
    first, last = now.lead, now.lead + now.owned - 1
    row = jax.lax.broadcasted_iota(jnp.int32, done.shape[-2:], 0)
    for at in range(done.shape[0]):
        earlier = done[at, 1 - slot, theirs].astype(jnp.float32)
        mine = done[at, slot, first].astype(jnp.float32)
        done[at, slot, first] = jnp.where(row < start, earlier, mine).astype(done.dtype)
        mine = done[at, slot, last].astype(jnp.float32)
        inside = row + BLOCK * (now.owned - 1) < end
        done[at, slot, last] = jnp.where(inside, mine, 0.0).astype(done.dtype)


def _send(action, done, out, sem, visit, j, heights, width, known):
    """Starts, or awaits, the copies of a visit's own blocks to HBM."""
    tile = done.shape[-1]
    to_block = visit.fetch + visit.skip

    def copy(begin, size, columns):
        lanes = pl.ds(pl.multiple_of(j * tile, LANES), columns)
        to = out.at[pl.ds(to_block + begin, size), :, lanes]
        moved = pltpu.make_async_copy(done.at[pl.ds(begin, size), :, pl.ds(0, columns)], to, sem)
        getattr(moved, action)()

    def blocks(columns):
        for i, height in enumerate(heights):
            size = height // BLOCK

            @kind_is(visit.kind, i, known)
            def _(size=size):
                if size > 1:
                    copy(visit.lead, size - 1, columns)

                @pl.when(visit.owned == size)
                def _():
                    copy(size - 1, 1, columns)

        @kind_is(visit.kind, len(heights), known)
        def _():
            jax.lax.fori_loop(0, visit.owned, lambda b, _: copy(b, 1, columns) or 0, 0)

    rest = width % tile
    if not rest:
        blocks(tile)
        return
    pl.when(j < width // tile)(functools.partial(blocks, tile))
    pl.when(j == width // tile)(functools.partial(blocks, rest))
