"""Rows of the layer on a mesh: memory of a DeepSeek-V2-Lite-like MoE layer, compiled for TPUs.

64 experts of width 1,408, top 6, model width 2,048, bfloat16; expert axis 8, 4,096 tokens per
device, forward and backward, strategy `chunked` (exact, dropless whatever the imbalance). Nothing
runs: the figure is XLA's own account of temporary memory per device.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from launch.bench_row import Row, Wanted, measure_in_process
from moejax.aot import topology

TOPOLOGY = "v5p:2x2x2"
LAYER = f"layer {TOPOLOGY} chunked, forward + backward"
FIGURE = f"{LAYER}, HBM temp per device"
OVERLAP = f"{LAYER}, all-to-alls of rows beside a matmul, outside loops"
WORK = f"{LAYER}, products done / model FLOPs, any load"
# Without it libtpu 0.0.42 runs no all-to-all beside anything; LIBTPU_INIT_ARGS takes it too.
OPTIONS: dict[str, str | bool] = {"xla_tpu_enable_async_all_to_all": "true"}
ROW_BYTES = 1 << 20  # smaller exchanges carry weights and counts
NUM_EXPERTS, TOP_K, WIDTH, FFN, NUM_TOKENS = 64, 6, 2048, 1408, 4096


def rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """With our TPU kernel inside; the peer is the same layer with jax's ragged_dot inside."""
    if wanted(WORK):
        # Gate, up and down; gate and up again; two products each backward. Only rows that are
        # there are multiplied, in further rounds too, so that no imbalance changes it. A kernel's
        # partial tiles come on top.
        how = "counted: 3 + 2 again + 6 of 9 products on the routed rows; no partial tiles"
        yield Row(WORK, (3 + 2 + 6) / 9, "x", "<= 1.30", how=how)
    if not wanted(FIGURE) and not wanted(OVERLAP):
        return
    environment = topology.environment(TOPOLOGY)
    found = {
        name: measure_in_process(
            "launch.bench_layer", name, environment=environment, timeout_s=1800
        )
        for name in ("tpu", "ragged_dot")[: 2 if peer else 1]
    }
    ours, other = found["tpu"], found.get("ragged_dot", {})
    who = "ragged_dot inside" if peer else ""
    how = "compiled ahead of time, " + " ".join(f"--{k}={v}" for k, v in OPTIONS.items())
    if wanted(FIGURE):
        yield Row(FIGURE, ours["temp_mb"], "MB", "<= 700", other.get("temp_mb"), who, how)
    if wanted(OVERLAP):
        how = f"of {ours['exchanges']:.0f}; the scheduled program's text"
        yield Row(OVERLAP, ours["beside"], "of all", "", other.get("beside"), who, how)


def measure(implementation: str) -> dict[str, float]:
    """Compiles the layer's gradient with one implementation of the grouped matmul."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from moejax import moe
    from moejax.aot import compile as aot
    from moejax.aot import hlo
    from moejax.core import tree
    from moejax.moe.expert_parallel import Parallel

    axes = {"data": 1, "fsdp": 1, "expert": 8, "tensor": 1}
    mesh = topology.mesh(TOPOLOGY, axes)
    config = moe.MoEConfig(NUM_EXPERTS, TOP_K, expert_ffn=FFN, **moe.CONVENTIONS["deepseek_v2"])
    shapes = jax.eval_shape(lambda key: moe.init_moe(key, WIDTH, FFN, config), jax.random.key(0))

    def placed(path, leaf):
        spec = PartitionSpec("expert") if path.startswith("experts/") else PartitionSpec()
        return aot.abstract(leaf.shape, jnp.bfloat16, mesh, spec)

    params = tree.map_with_path(placed, shapes)
    tokens = PartitionSpec(("data", "fsdp", "expert"))
    x_BTD = aot.abstract((8, NUM_TOKENS, WIDTH), jnp.bfloat16, mesh, tokens)
    parallel = Parallel(mesh, "chunked")

    def gradient(params, x_BTD):
        def loss(params, x_BTD):
            y_BTD, stats = moe.moe_layer(
                params, x_BTD, config, parallel=parallel, implementation=implementation
            )
            return jnp.sum(y_BTD.astype(jnp.float32) ** 2) + stats.balance_loss

        return jax.grad(loss, (0, 1))(params, x_BTD)

    compiled = aot.compile_for(gradient, params, x_BTD, options=OPTIONS)
    exchanges = [
        one
        for one in hlo.collectives(compiled.as_text() or "")
        if one.kind == "all-to-all" and not one.in_loop and one.bytes > ROW_BYTES
    ]
    return {
        "temp_mb": round(aot.memory(compiled).temp_bytes / 1e6, 1),
        "exchanges": len(exchanges),
        "beside": sum(one.with_matmul for one in exchanges),
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
