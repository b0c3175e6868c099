"""Rows of the layer on a mesh: a DeepSeek-V2-Lite-like MoE layer, compiled for TPUs and GPUs.

64 experts of width 1,408, top 6, model width 2,048, bfloat16; expert axis 8, 4,096 tokens per
device, forward and backward, strategy `chunked` (exact, dropless whatever the imbalance). Nothing
runs: memory is XLA's own account of temporary memory per device, overlap is read off the scheduled
program, spills are what ptxas says of the kernels. The work is counted (`launch.bench_work`).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from launch import bench_tpu_peers, bench_work
from launch.bench_row import Row, Wanted, measure_in_process
from launch.bench_tpu_peers import PEERS
from launch.bench_work import FFN, NUM_EXPERTS, NUM_TOKENS, SHARDS, TOP_K, WIDTH
from moejax.aot import ptx, topology
from moejax.core.errors import InputError

LAYER = "layer {} chunked, forward + backward, {}"
MEMORY, OVERLAP = "HBM temp per device", "all-to-alls of rows beside a matmul, balanced load"
PIPELINE = "all-to-alls overlapped with a matmul, but for the ends of the pipeline"
# The four of a layer: scopes of `moejax.moe.chunked`, whether of the backward pass.
FOUR = {
    "x out": (("send_x",), False),
    "y back": (("back_y",), False),
    "x and dL/dy out": (("send_x", "send_d_y"), True),
    "dL/dx back": (("back_d_x",), True),
}
SPILLS = "bytes that its kernels spill"
# Without it libtpu 0.0.42 runs no all-to-all beside anything; LIBTPU_INIT_ARGS takes it too.
OPTIONS: dict[str, str | bool] = {"xla_tpu_enable_async_all_to_all": "true"}
ROW_BYTES = 1 << 20  # smaller exchanges carry weights and counts
PEER = "ragged_dot"


class Target(NamedTuple):
    """A topology, our implementation there, the goal in MB, which figures it has, and peers."""

    topology: str
    implementation: str
    goal: str
    figures: tuple[str, ...]
    peers: tuple[str, ...] = ()  # beside PEER


TARGETS = (
    Target("v5p:2x2x2", "tpu", "<= 700", (MEMORY, PIPELINE, OVERLAP), tuple(PEERS)),
    Target("h100x8", "gpu", "<= 1,000", (MEMORY, SPILLS)),
)


def rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """With our kernel inside; a peer is the same layer with another grouped product inside."""
    yield from bench_work.rows(wanted)
    for target in TARGETS:
        names = {figure: LAYER.format(target.topology, figure) for figure in target.figures}
        if any(wanted(name) for name in names.values()):
            yield from _compiled(target, names, peer, wanted)


def _compiled(target: Target, names: dict[str, str], peer: bool, wanted: Wanted) -> Iterator[Row]:
    try:
        ours = _measured(target, target.implementation)
        other = _measured(target, PEER) if peer else {}
    except InputError as error:
        for name in filter(wanted, names.values()):
            yield Row(name, None, "", how=f"not measured: {error}")
        return
    who = f"{PEER} inside" if peer else ""
    how = "compiled ahead of time"
    if target.implementation == "tpu":
        how += ", " + " ".join(f"--{k}={v}" for k, v in OPTIONS.items())
    if wanted(names[MEMORY]):
        temp = ours["temp_mb"], "MB", target.goal, other.get("temp_mb")
        yield Row(names[MEMORY], *temp, who, how)
        for name in target.peers if peer else ():
            yield _beside(target, name, names[MEMORY], ours["temp_mb"])
    if PIPELINE in names and wanted(names[PIPELINE]):
        how = "all but the ends of the pipeline beside a matmul, of each: " + ours["four_parts"]
        four = ours["four"], "of 4", ">= 4", other.get("four")
        yield Row(names[PIPELINE], *four, who, how)
    if OVERLAP in names and wanted(names[OVERLAP]):
        how = f"of {ours['exchanges']:.0f}; the scheduled program's text"
        yield Row(names[OVERLAP], ours["beside"], "of all", "", other.get("beside"), who, how)
    if SPILLS in names and wanted(names[SPILLS]):
        how = f"ptxas, {ours['kernels']:.0f} kernels; with wgmma: {ours['wgmma']:.0f}"
        yield Row(names[SPILLS], ours["spilled"], "bytes", "<= 0", how=how)


def _measured(target: Target, name: str) -> dict[str, Any]:
    environment = topology.environment(target.topology)
    arguments = (target.topology, name)
    module = "launch.bench_layer"
    return measure_in_process(module, *arguments, environment=environment, timeout_s=1800)


def _beside(target: Target, name: str, figure: str, ours: float) -> Row:
    """Our memory beside that of the layer with a kernel of `launch.bench_tpu_peers` inside."""
    figure, who = f"{figure}, against {name}", f"{name} inside"
    try:
        if reason := bench_tpu_peers.lacks(name):
            raise InputError(reason)
        temp = _measured(target, name)["temp_mb"]
    except InputError as error:
        return Row(figure, ours, "MB", peer_name=who, how=f"not measured: {error}")
    return Row(figure, ours, "MB", "", temp, who, "compiled ahead of time")


def hidden(exchanges: list, runs: Mapping[str, float]) -> dict[str, tuple[int, int, int]]:
    """Of each of the four: exchanges beside a matmul, all, and ends of the pipeline.

    runs: of each computation under a balanced load. Each array that travels begins or ends the
    pipeline once: nothing is left to run beside that.
    """
    found = {}

    def count(some: Iterable) -> int:
        return round(sum(runs[one.computation] for one in some))

    for name, (scopes, backward) in FOUR.items():
        mine = [
            one
            for one in exchanges
            if any(scope in one.scope.split("/") for scope in scopes)
            and ("transpose(" in one.scope) == backward
        ]
        beside = count(one for one in mine if one.with_matmul)
        found[name] = beside, count(mine), len(scopes)
    return found


def measure(name: str, implementation: str, dump: Path) -> dict[str, Any]:
    """Compiles the layer's gradient with one implementation of the grouped matmul."""
    if implementation == "gpu":
        os.environ["XLA_FLAGS"] = ptx.dump_flags(dump)
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from moejax import moe
    from moejax.aot import compile as aot
    from moejax.aot import hlo, hlo_cost
    from moejax.core import tree
    from moejax.moe.expert_parallel import Parallel

    if implementation in PEERS:
        bench_tpu_peers.put_in_place_of(PEER, implementation)
        implementation = PEER
    axes = {"data": 1, "fsdp": 1, "expert": SHARDS, "tensor": 1}
    mesh = topology.mesh(name, axes)
    config = moe.MoEConfig(NUM_EXPERTS, TOP_K, expert_ffn=FFN, **moe.CONVENTIONS["deepseek_v2"])
    shapes = jax.eval_shape(lambda key: moe.init_moe(key, WIDTH, FFN, config), jax.random.key(0))

    def placed(path, leaf):
        spec = PartitionSpec("expert") if path.startswith("experts/") else PartitionSpec()
        return aot.abstract(leaf.shape, jnp.bfloat16, mesh, spec)

    params = tree.map_with_path(placed, shapes)
    tokens = PartitionSpec(("data", "fsdp", "expert"))
    x_BTD = aot.abstract((SHARDS, NUM_TOKENS, WIDTH), jnp.bfloat16, mesh, tokens)
    parallel = Parallel(mesh, "chunked")

    def gradient(params, x_BTD):
        def loss(params, x_BTD):
            y_BTD, stats = moe.moe_layer(
                params, x_BTD, config, parallel=parallel, implementation=implementation
            )
            return jnp.sum(y_BTD.astype(jnp.float32) ** 2) + stats.balance_loss

        return jax.grad(loss, (0, 1))(params, x_BTD)

    options = OPTIONS if ":" in name else None
    compiled = aot.compile_for(gradient, params, x_BTD, options=options)
    text = compiled.as_text() or ""
    exchanges = [
        one
        for one in hlo.collectives(text)
        if one.kind == "all-to-all" and one.bytes > ROW_BYTES
    ]
    four = hidden(exchanges, hlo_cost.cost(hlo.parse(text)).runs)
    kernels = ptx.kernels(dump, "grouped_").values() if implementation == "gpu" else []
    return {
        "temp_mb": round(aot.memory(compiled).temp_bytes / 1e6, 1),
        "exchanges": sum(all_ for _, all_, _ in four.values()),
        "beside": sum(beside for beside, _, _ in four.values()),
        "four": sum(0 < total <= beside + ends for beside, total, ends in four.values()),
        "four_parts": ", ".join(f"{k} {beside} of {all_}" for k, (beside, all_, _) in four.items()),
        "kernels": len(kernels),
        "wgmma": sum(kernel.wgmma > 0 for kernel in kernels),
        "spilled": sum(kernel.spilled for kernel in kernels),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], Path(folder))))
