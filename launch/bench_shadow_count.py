"""Compiles one decoding layer for a v5e and prints its cycles and bytes, as JSON.

`python -m launch.bench_shadow_count sparse opt-1.3b`, in the environment that `launch.bench_shadow`
makes. One token, one row, bfloat16, keys and values of 256 slots; the norms, and the update of the
cache, which both layers do alike, are left out: the compiler's profile ends the process at it. So
it does at the gather of the kept heads' keys and values, of which the bytes count three times
(read, written, read again) and not the cycles. The sparse layer has one L-th of the predictor,
float32.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from launch import bench_shadow as bench
from moejax.aot import compile as aot
from moejax.aot import cycles, topology
from moejax.core import tree
from moejax.methods import shadow_predictor as predictors
from moejax.methods.shadow_mask import Mask, sizes_of
from moejax.models.config import ModelConfig
from moejax.models.families import by_name
from moejax.models.layers import ACTIVATION, feed_forward, feed_forward_shapes
from moejax.models.params import abstract_params
from moejax.ops.attention import Visible, attention
from moejax.ops.sparse_ffn import sparse_ffn
from moejax.ops.sparse_matmul import sparse_matmul

SLOTS, BLOCK, SPARSITY = 256, 128, 0.5  # a block is 512 KB of each matrix
Array = Callable[..., Any]


def main() -> None:
    kind, shape = sys.argv[1:]
    mesh = Mesh(topology.devices(bench.TOPOLOGY)[:1], ("one",))
    config = by_name(bench.SHAPES[shape]).presets[shape]

    def array(*dims: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return aot.abstract(dims, dtype, mesh, PartitionSpec())

    print(json.dumps((sparse if kind == "sparse" else dense)(config, array)))


def dense(config: ModelConfig, array: Array) -> dict[str, float]:
    """Of XLA's layer: all heads and all neurons."""
    d, h, g, c = config.d_model, config.num_heads, config.num_kv_heads, config.head_size
    x, keys = array(1, d), array(1, g, SLOTS, c)
    mlp = {name: array(*shape) for name, shape in feed_forward_shapes(config).items()}
    parts = [
        _part(jnp.matmul, x, array(d, h * c)),
        *[_part(jnp.matmul, x, array(d, g * c))] * 2,
        _part(_mixed, array(1, 1, h, c), keys, keys),
        _part(jnp.matmul, array(1, h * c), array(h * c, d)),
        _part(lambda x, mlp: feed_forward(mlp, x, ACTIVATION[config.activation]), x, mlp),
    ]
    return _sum(parts)


def sparse(config: ModelConfig, array: Array) -> dict[str, float]:
    """Of the layer that skips, with its part of the predictor and of the choice by its scores."""
    d, g, c = config.d_model, config.num_kv_heads, config.head_size
    sizes = sizes_of(config, BLOCK, "query" if g == config.num_heads else "group")
    wide = config.num_heads // sizes.heads * c
    heads, blocks = sizes.kept((SPARSITY, SPARSITY))
    x, rows, kept = array(1, d), array(sizes.heads, wide, d), array(1, heads, SLOTS, c)
    mlp = {}
    for name, shape in feed_forward_shapes(config).items():
        if name.startswith("w_"):
            mlp[f"rows_{name[2:]}"] = array(sizes.blocks, BLOCK, d)
        else:
            mlp[name] = array(*((sizes.blocks, BLOCK) if name != "b_down" else shape))
    lists = (array(heads, dtype="int32"), array(blocks, dtype="int32"))

    def ffn(x, mlp, chosen):
        return sparse_ffn(mlp, x, chosen, ACTIVATION[config.activation])

    parts = [
        _part(sparse_matmul, x, rows, lists[0], skipped=(sizes.heads - heads) / sizes.heads),
        *[_part(sparse_matmul, x, array(g, c, d), array(g, dtype="int32"))] * 2,
        _part(_mixed, array(1, 1, heads * wide // c, c), kept, kept),
        {"cycles": 0.0, "bytes": 2.0 * tree.num_bytes((kept, kept))},  # of their gather
        _part(
            sparse_matmul,
            array(1, heads, wide),
            rows,
            lists[0],
            skipped=(sizes.heads - heads) / sizes.heads,
        ),
        _part(ffn, x, mlp, lists[1], skipped=(sizes.blocks - blocks) / sizes.blocks),
    ]
    predictor = _predictor(config, sizes, array)
    return _sum([*parts, {name: n / config.num_layers for name, n in predictor.items()}])


def _part(function: Callable[..., Any], *operands: Any, skipped: float = 0.0) -> dict[str, float]:
    """Cycles of a part of the layer, and bytes: what it is given, less the share of blocks skipped.

    Parts are compiled apart, since the profile ends the process where one reads another's result.
    """
    found = _found(aot.compile_for(function, *operands), tree.num_bytes(operands))
    blocks = [leaf for leaf in jax.tree.leaves(operands) if leaf.ndim == 3 and leaf.shape[0] > 1]
    found["bytes"] -= skipped * tree.num_bytes(blocks)
    return found


def _sum(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def _mixed(q_BTHC: jax.Array, k_BGSC: jax.Array, v_BGSC: jax.Array) -> jax.Array:
    visible = Visible(slot=jnp.int32(SLOTS - 1), start_B=jnp.zeros(1, jnp.int32))
    return attention(q_BTHC, k_BGSC, v_BGSC, visible)


def _predictor(config: ModelConfig, sizes, array: Array) -> dict[str, float]:
    """All of the predictor, as large as may be, and the order of its scores."""
    size = config.num_heads * config.head_size
    num_params = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(config)))
    hidden = predictors.hidden_within(config, sizes, 0.01, num_params)
    static = Mask(*(jnp.zeros((sizes.num_layers, n)) for n in (sizes.heads, sizes.blocks)))
    params = jax.eval_shape(
        functools.partial(predictors.init, input_size=size, hidden=hidden, static=static),
        jax.random.key(0),
    )
    params = jax.tree.map(lambda leaf: array(*leaf.shape, dtype="float32"), params)

    def choose(params, context):
        scores = predictors.predict(params, context, sizes)
        both = zip((scores.heads, scores.blocks), sizes.kept((SPARSITY,) * 2), strict=True)
        return [jnp.sort(jax.lax.top_k(part, n)[1], axis=-1) for part, n in both]

    return _found(aot.compile_for(choose, params, array(1, size)), tree.num_bytes(params))


def _found(compiled: jax.stages.Compiled, num_bytes: float) -> dict[str, float]:
    return {"cycles": float(cycles.program_cycles(compiled)), "bytes": float(num_bytes)}


if __name__ == "__main__":
    main()
