"""Cycles of a peer's TPU kernel (`launch.bench_tpu_peers`), counted by the compiler, as JSON.

`python -m launch.bench_megablox megablox forward`, in the environment that `launch.bench_tpu`
makes. The peers' grid has as many steps as there are tiles of rows to visit, and their bodies
branch; libtpu counts neither. So the number of visits is made static, and each branch is taken
always or never.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import json
import sys
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec

from launch import bench_tpu as shape
from launch.bench_tpu_peers import PEERS, Peer
from moejax.aot import compile as aot
from moejax.aot import cycles, topology

FEW, MANY = 4, 8
Tiling = tuple[int, int, int]


def main() -> None:
    name, product = sys.argv[1:]
    peer = PEERS[name]
    module = importlib.import_module(peer.module)
    tables = module.make_group_metadata
    found = []
    for tiling in peer.tilings[product]:
        active = [_active(tables, sizes, tiling[0], product) for sizes in shape.draws()]
        depth = shape.COLUMNS if product == "dx" else shape.DEPTH
        one: dict[str, Any] = {"tiling": tiling, "steps": -(-depth // tiling[1]), "active": active}
        for kind in ("middle", "ends"):
            _take_branches(peer, module, kind == "ends")
            few, many = (_count(module, product, tiling, num) for num in (FEW, MANY))
            one[kind] = (many - few) / (MANY - FEW)
        found.append(one)
    print(json.dumps({"version": importlib.metadata.version(peer.package), "tilings": found}))


def _active(tables: Any, sizes: Any, rows: int, product: str) -> int:
    """Tiles of rows that the peer's own table of these groups visits."""
    return int(
        tables(
            group_sizes=jnp.asarray(sizes, jnp.int32),
            m=shape.NUM_ROWS,
            tm=rows,
            start_group=jnp.zeros((), jnp.int32),
            num_nonzero_groups=shape.NUM_GROUPS,
            visit_empty_groups=product == "dW",
        )[1]
    )


def _count(module: ModuleType, product: str, tiling: Tiling, num: int) -> int:
    """Cycles of one core for `num` visits."""
    mesh = Mesh(topology.devices(shape.TOPOLOGY)[:1], ("one",))
    kinds: dict[str, Any] = {"tiling": tiling, "preferred_element_type": jnp.bfloat16}
    if module.__name__.startswith("tokamax"):
        kinds = {"tiling": tiling, "out_dtype": jnp.bfloat16, "precision": None}

    def array(*dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return aot.abstract(dims, dtype, mesh, PartitionSpec())

    def program(x, y, sizes, *tables):
        module.make_group_metadata = lambda **_: (tables, num)  # type: ignore[attr-defined]
        # Without the jit around them, which would keep the first of these programs.
        if product == "dW":
            return module.tgmm.__wrapped__(x.T, y, sizes, **kinds)
        return module.gmm.__wrapped__(x, y, sizes, transpose_rhs=product == "dx", **kinds)

    x = array(shape.NUM_ROWS, shape.COLUMNS if product == "dx" else shape.DEPTH)
    y = array(shape.NUM_GROUPS, shape.DEPTH, shape.COLUMNS)
    if product == "dW":
        y = array(shape.NUM_ROWS, shape.COLUMNS)
    whole = functools.partial(array, dtype=jnp.int32)
    visits = shape.NUM_ROWS // tiling[0] + shape.NUM_GROUPS - 1
    tables = whole(shape.NUM_GROUPS), whole(shape.NUM_GROUPS + 1), whole(visits), whole(visits)
    return cycles.kernel_cycles(aot.compile_for(program, x, y, *tables))


def _take_branches(peer: Peer, module: Any, ends: bool) -> None:
    """Every step begins and ends a tile of the result, or none does: in this process alone."""

    class Lax:
        def __getattr__(self, name: str) -> Any:
            return getattr(jax.lax, name)

        @staticmethod
        def cond(is_last: Any, last: Any, other: Any) -> Any:
            return last() if ends else other()

    def when(condition: Any) -> Any:
        return lambda body: body() if ends or body.__name__ == peer.computes else None

    def on_one_core(kernel, *, compiler_params, input_buffer_count, metadata, **kinds):
        one = dataclasses.replace(compiler_params, dimension_semantics=("arbitrary",) * 3)
        return pl.pallas_call(kernel, compiler_params=one, **kinds)

    pl.when = when  # type: ignore[assignment]
    module.lax = Lax()
    if peer.cores == 1:
        module.common.custom_buffered_pallas_call = on_one_core


if __name__ == "__main__":
    main()
