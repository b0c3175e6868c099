"""Rows of an NVIDIA GPU, timed on it: experts' grouped products, feed-forward layers in blocks.

Shapes are those of published models, sizes of groups uneven as a router makes them, numbers
bfloat16. Calls are queued one behind the other and timed together; ours and a peer take turns, and
the figure is a median. Peers: torch's grouped product (CUTLASS), jax's ragged_dot and jax's own
Mosaic kernel in the best of a few sizes.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.bench_row import Row, Wanted
from moejax.core.errors import InputError
from moejax.core.platform import platform
from moejax.ops.grouped_matmul import grouped_matmul
from moejax.ops.sparse_ffn import sparse_ffn

# Rows, experts, width of the model, width of an expert.
SHAPES = {
    "DeepSeek-V2-Lite": (49152, 64, 2048, 1408),
    "Mixtral-8x7B": (16384, 8, 4096, 14336),
    "Qwen3-30B-A3B": (65536, 128, 2048, 768),
    "DeepSeek-V2-Lite decoding": (512, 64, 2048, 1408),
}
# Width and neurons of a layer.
LAYERS = {"Llama-3.2-1B": (2048, 8192), "Llama-2-7B": (4096, 11008)}
BATCHES, BLOCK, NUM_LAYERS = (1, 4, 8), 64, 8
# Rows and columns of a tile, steps under way, tiles of columns in a row.
MOSAIC = ((128, 128, 5, 8), (128, 128, 4, 4), (128, 192, 4, 8))
ROUNDS, ROUND_S = 5, 0.02
Call = Callable[[], Any]


def rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """TFLOP/s of each product beside a dense one, layers beside dense ones, and the peers."""
    if platform() != "gpu":
        raise InputError("needs an NVIDIA GPU and pip install -e .[cuda12]")
    for name, shape in SHAPES.items():
        yield from _products(f"gpu {name} bf16", shape, peer, wanted)
    for name, layer in LAYERS.items():
        for batch in BATCHES:
            figure = f"gpu {name} layer bf16 batch {batch}, 50% kept, of the dense one's time"
            if wanted(figure):
                yield _blocks(figure, layer, batch)


def _products(what: str, shape: tuple[int, ...], peer: bool, wanted: Wanted) -> Iterator[Row]:
    num_rows, num_experts, width, ffn = shape
    figures = {op: f"{what}, {op}" for op in ("forward", "dx", "dW")}
    if not any(wanted(figure) for figure in figures.values()):
        return
    keys = jax.random.split(jax.random.key(0), 3)
    dims = ((num_rows, width), (num_experts, width, ffn), (num_rows, ffn))
    x, w, dy = (jax.random.normal(k, d, jnp.bfloat16) for k, d in zip(keys, dims, strict=True))
    sizes = _sizes(num_rows, num_experts)
    calls = _ours(x, w, dy, jnp.asarray(sizes))
    dense = jax.jit(jnp.matmul)
    ceiling = functools.partial(dense, x, w[0])
    work = 2 * num_rows * width * ffn / 1e12
    for op, figure in figures.items():
        if not wanted(figure):
            continue
        rivals: dict[str, Call] = {"dense": ceiling}
        if peer:
            rivals |= _torch(op, shape, sizes) | _mosaic(op, x, w, dy, jnp.asarray(sizes))
            if op == "forward":
                ragged = jax.jit(jax.lax.ragged_dot)
                rivals["jax.lax.ragged_dot"] = functools.partial(ragged, x, w, jnp.asarray(sizes))
        times = _in_turns({"ours": calls[op], **rivals})
        rates = {name: work / seconds for name, seconds in times.items()}
        others = [name for name in rates if name not in ("ours", "dense")]
        best = max(others, key=lambda name: rates[name], default="")
        told = ", ".join(f"{n} {r:.0f}" for n, r in rates.items() if n not in ("ours", best))
        how = f"medians of {ROUNDS} rounds in turns; others: {told}"
        yield Row(figure, rates["ours"], "TFLOP/s", "", rates.get(best), best, how)


def _ours(x: Any, w: Any, dy: Any, sizes: Any) -> dict[str, Call]:
    def product(x, w):
        return grouped_matmul(x, w, sizes)

    dx = jax.jit(lambda x, w, dy: jax.vjp(lambda x: product(x, w), x)[1](dy)[0])
    dw = jax.jit(lambda x, w, dy: jax.vjp(lambda w: product(x, w), w)[1](dy)[0])
    return {
        "forward": functools.partial(jax.jit(product), x, w),
        "dx": functools.partial(dx, x, w, dy),
        "dW": functools.partial(dw, x, w, dy),
    }


def _sizes(num_rows: int, num_experts: int) -> np.ndarray:
    """Uneven, as routers are: the largest expert has 1.6 to 2.2 times the mean."""
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(num_experts, 10.0))
    drawn = rng.choice(num_experts, num_rows, p=share)
    return np.bincount(drawn, minlength=num_experts).astype(np.int32)


def _torch(op: str, shape: tuple[int, ...], sizes: np.ndarray) -> dict[str, Call]:
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    grouped = getattr(torch, "_grouped_mm", None)
    if grouped is None or not torch.cuda.is_available():
        return {}
    num_rows, num_experts, width, ffn = shape
    make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    ends = torch.from_numpy(sizes.cumsum().astype(np.int32)).cuda()
    if op == "dW":
        x, dy = make(num_rows, width), make(num_rows, ffn)
        run = functools.partial(grouped, x.t(), dy, offs=ends)
    elif op == "dx":
        dy, w = make(num_rows, ffn), make(num_experts, width, ffn)
        run = functools.partial(grouped, dy, w.transpose(1, 2), offs=ends)
    else:
        x, w = make(num_rows, width), make(num_experts, width, ffn)
        run = functools.partial(grouped, x, w, offs=ends)
    return {"torch._grouped_mm": run}


def _mosaic(op: str, x: Any, w: Any, dy: Any, sizes: Any) -> dict[str, Call]:
    """jax's kernel in its best sizes; it has no gradient of the matrices for whole rows."""
    if op == "dW" or x.shape[0] < 4096:
        return {}
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    rows, columns = (dy, w.shape[1]) if op == "dx" else (x, w.shape[2])
    found: dict[str, Call] = {}
    for block_m, block_n, steps, run in MOSAIC:
        together = next((n for n in (run, 4, 2, 1) if columns % (block_n * n) == 0), 0)
        if not together:
            continue
        kernel = functools.partial(
            ragged_dot, group_sizes=sizes, transpose_rhs=op == "dx", block_m=block_m,
            block_n=block_n, block_k=64, max_concurrent_steps=steps, grid_block_n=together,
        )  # fmt: skip
        call = functools.partial(jax.jit(lambda x, w, kernel=kernel: kernel(x, w)), rows, w)
        found[f"jax's Mosaic kernel {block_m} {block_n} {steps} {together}"] = call
    times = _in_turns(found) if found else {}
    return {"jax's Mosaic kernel": found[min(times, key=times.__getitem__)]} if times else {}


def _blocks(figure: str, layer: tuple[int, int], batch: int) -> Row:
    """A gated layer's chosen blocks, NUM_LAYERS with weights of their own, one after the other."""
    width, neurons = layer
    shape = (neurons // BLOCK, BLOCK, width)
    layers = [
        {
            f"rows_{part}": 0.02 * jax.random.normal(jax.random.key(3 * i + j), shape, jnp.bfloat16)
            for j, part in enumerate(("gate", "up", "down"))
        }
        for i in range(NUM_LAYERS)
    ]
    x = jax.random.normal(jax.random.key(0), (batch, width), jnp.bfloat16)
    draws = [np.random.default_rng(i).permutation(shape[0]) for i in range(NUM_LAYERS)]
    kept = jnp.asarray(np.stack([np.sort(d[: shape[0] // 2]) for d in draws]))

    @jax.jit
    def dense(layers, x):
        for params in layers:
            gate, up, down = (p.reshape(neurons, width) for p in params.values())
            x = x + (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down
        return x

    @jax.jit
    def sparse(layers, x, kept):
        for params, chosen in zip(layers, kept, strict=True):
            x = x + sparse_ffn(params, x, chosen, jax.nn.silu)
        return x

    times = _in_turns({"ours": lambda: sparse(layers, x, kept), "dense": lambda: dense(layers, x)})
    each = {name: seconds / NUM_LAYERS for name, seconds in times.items()}
    read = 1.5 * width * neurons * 2
    how = (
        f"{each['ours'] * 1e6:.1f} of {each['dense'] * 1e6:.1f} us a layer, weights read at "
        f"{read / each['ours'] / 1e12:.2f} and {2 * read / each['dense'] / 1e12:.2f} TB/s"
    )
    return Row(figure, each["ours"] / each["dense"], "", "<= 0.6", how=how)


def _in_turns(calls: dict[str, Call]) -> dict[str, float]:
    """Seconds of each call, the median over ROUNDS; a round queues as many as fill ROUND_S."""
    num = {}
    for name, call in calls.items():
        _wait(call())  # compiled
        num[name] = max(1, min(100, int(ROUND_S / max(1e-6, _seconds(call, 1)))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            found[name].append(_seconds(call, num[name]))
    return {name: statistics.median(times) for name, times in found.items()}


def _seconds(call: Call, num: int) -> float:
    """Of one of `num` calls that wait for each other on the device alone."""
    _wait(call())
    start = time.perf_counter()
    for _ in range(num):
        result = call()
    _wait(result)
    return (time.perf_counter() - start) / num


def _wait(result: Any) -> None:
    if isinstance(result, jax.Array):
        jax.block_until_ready(result)
    else:
        import torch

        torch.cuda.synchronize()
