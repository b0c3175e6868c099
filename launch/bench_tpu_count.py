"""Compiles one product for a TPU and prints the cycles that the compiler counts in it, as JSON.

`python -m launch.bench_tpu_count ours forward`, in the environment that `launch.bench_tpu` makes.
A kernel is compiled with a few and with more visits of one kind: the difference is what a visit
costs, the rest what a call costs before its first one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from launch import bench_tpu as shape
from moejax.aot import compile as aot
from moejax.aot import cycles, topology
from moejax.ops import tpu_outer, tpu_rows
from moejax.ops.grouped_matmul_tpu import PRODUCT, PRODUCT_T
from moejax.ops.tpu_rows import Form
from moejax.ops.tpu_visits import BLOCK, PER_VISIT, Table

FEW, MANY = 4, 8
NO_KIND = -1  # of a visit that computes nothing: fetching and counting are left
_TILING = re.compile(r'ragged_dot_tiling="([0-9,]+)"')
GATED = Form("gated", ((0, 0), (0, 1)), lambda a, b: (jax.nn.silu(a) * b,), 1)


def main() -> None:
    who, product = sys.argv[1:]
    mesh = Mesh(topology.devices(shape.TOPOLOGY)[:1], ("one",))

    def array(*dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return aot.abstract(dims, dtype, mesh, PartitionSpec())

    if who == "ours":
        print(json.dumps(_ours(product, array)))
    else:
        print(json.dumps(_ragged_dot(product, array)))


def _ours(product: str, array: Callable[..., Any]) -> dict[str, Any]:
    tiles = shape.tiles(product)
    count = _sums if product == "dW" else _rows
    kinds = len(tiles.heights) + (2 if product == "dW" else 0)
    found: list[float] = []
    start = 0.0
    for kind in (*range(kinds), NO_KIND):
        few, many = (count(product, tiles, kind, num, array) for num in (FEW, MANY))
        visit = (many - few) / (MANY - FEW)
        found.append(visit)
        start = max(start, few - FEW * visit)
    *found, idle = found
    return {"visits": [*found, 0.0], "idle": idle, "start": start}


def _table(num: int, cores: int, array: Callable[..., Any]) -> Table:
    """Of so many visits for each core."""
    return Table(array(PER_VISIT * cores + 3, num, dtype=jnp.int32), array(1, dtype=jnp.int32))


def _rows(product: str, tiles: Any, kind: int, num: int, array: Callable[..., Any]) -> int:
    form = {"forward": PRODUCT, "dx": PRODUCT_T}.get(product, GATED)
    depth = shape.COLUMNS if form.transposed else shape.DEPTH
    matrix = array(shape.NUM_GROUPS, shape.DEPTH, shape.COLUMNS)
    # The tallest height sets what is fetched; only the kind's own work is compiled.
    x = array(shape.NUM_ROWS // BLOCK, BLOCK, depth)
    table = _table(num, 2, array)
    ws = [matrix] * (1 + max(k for _, k in form.pairs))

    def program(x, ws, table):
        return tpu_rows.call(form, [x], ws, table, tiles, known=kind)

    return cycles.kernel_cycles(aot.compile_for(program, x, ws, table))


def _sums(product: str, tiles: Any, kind: int, num: int, array: Callable[..., Any]) -> int:
    x = array(shape.NUM_ROWS // BLOCK, BLOCK, shape.DEPTH)
    y = array(shape.NUM_ROWS // BLOCK, BLOCK, shape.COLUMNS)
    table = _table(num, 1, array)

    def program(x, y, table):
        return tpu_outer.call(x, y, table, shape.NUM_GROUPS, tiles, known=kind)

    return cycles.kernel_cycles(aot.compile_for(program, x, y, table))


def _ragged_dot(product: str, array: Callable[..., Any]) -> dict[str, Any]:
    """Cycles of a visit of so many rows of a group, and of the rest of the program.

    A copy of the weights to another layout is left out: they might have had it before.
    """
    x = array(shape.NUM_ROWS, shape.DEPTH)
    y = array(shape.NUM_ROWS, shape.COLUMNS)
    w = array(shape.NUM_GROUPS, shape.DEPTH, shape.COLUMNS)
    sizes = array(shape.NUM_GROUPS, dtype=jnp.int32)

    def forward(x, w, sizes):
        return jax.lax.ragged_dot(x, w, sizes)

    def gated(x, w, w_up, sizes):
        return jax.nn.silu(forward(x, w, sizes)) * forward(x, w_up, sizes)

    def backward(x, w, y, sizes):
        pulled = jax.vjp(lambda x, w: forward(x, w, sizes), x, w)[1](y)
        return pulled[product == "dW"]

    if product in ("dx", "dW"):
        compiled = aot.compile_for(backward, x, w, y, sizes)
    elif product == "forward":
        compiled = aot.compile_for(forward, x, w, sizes)
    else:
        compiled = aot.compile_for(gated, x, w, w, sizes)
    if product == "dW":
        masked = cycles.masked_product(compiled)
        rest = cycles.program_cycles(compiled, without=(" copy(",)) - masked.cycles
        visit = masked.cycles / (shape.NUM_GROUPS * masked.windows)
        return {"visit": visit, "rows": masked.rows, "rest": rest}
    tilings = _TILING.findall(compiled.as_text() or "")
    (tiling,) = set(tilings)
    rows, depth, columns = map(int, tiling.split(","))
    few, many = (_tiled(product, (rows, depth, columns), num, array) for num in (FEW, MANY))
    visit = len(tilings) * (many - few) / (MANY - FEW)
    rest = cycles.program_cycles(compiled, without=(" copy(", "ragged_dot_tiling="))
    return {"visit": visit, "rows": rows, "rest": rest}


def _tiled(product: str, tiling: tuple[int, int, int], num: int, array: Callable[..., Any]) -> int:
    """What libtpu makes of ragged_dot forward and for dx, with a known number of visits.

    Its kernel, as the compiled program holds it, multiplies a tile of rows by one of columns, the
    depth whole, for each group that has rows there, and keeps what other groups have written.
    """
    rows, depth, columns = tiling
    wide = shape.DEPTH if product == "dx" else shape.COLUMNS

    def kernel(group, tile, starts, x, w, out):
        v = pl.program_id(1)
        row = tile[v] * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 0)
        inside = (row >= starts[group[v]]) & (row < starts[group[v] + 1])
        y = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)
        out[...] = jnp.where(inside, y.astype(out.dtype), out[...])

    def program(group, tile, starts, x, w):
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(-(-wide // columns), num),
                in_specs=[
                    pl.BlockSpec((rows, depth), lambda n, v, group, tile, _: (tile[v], 0)),
                    pl.BlockSpec((None, depth, columns), lambda n, v, group, *_: (group[v], 0, n)),
                ],
                out_specs=pl.BlockSpec((rows, columns), lambda n, v, group, tile, _: (tile[v], n)),
            ),
            out_shape=jax.ShapeDtypeStruct((shape.NUM_ROWS, wide), jnp.bfloat16),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        )(group, tile, starts, x, w)

    tables = [array(size, dtype=jnp.int32) for size in (num, num, shape.NUM_GROUPS + 1)]
    arrays = array(shape.NUM_ROWS, depth), array(shape.NUM_GROUPS, depth, wide)
    return cycles.kernel_cycles(aot.compile_for(program, *tables, *arrays))


if __name__ == "__main__":
    main()
