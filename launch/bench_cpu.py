"""Rows of the CPU: the expert block, forward and backward, timed in pairs with its peers.

The block is the sort by expert, gate, up, activation, down and the weighted sum, in float32 on
4,096 tokens with uniformly drawn experts. Ours and a peer take turns, so that load from elsewhere
meets both; the figure is the median of the pairs' ratios of times. transformers runs in a process
of its own, once as its users find it, once with freed memory kept, as our commands keep it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.bench_row import Elsewhere, Row, Wanted, paired, timed
from moejax.moe.dispatch import combine, dispatch, plan
from moejax.moe.experts import grouped_ffn
from moejax.train.peak import measure_gemm_peak

NUM_TOKENS, NUM_PAIRS = 4096, 9
GOAL = 1.5  # times the speed of transformers' block
NUM_SLOW_PAIRS = 3  # ragged_dot takes seconds
# name -> experts, experts per token, width of the model, width of an expert
SHAPES = {"E8 top-2 d512 f1024": (8, 2, 512, 1024), "E64 top-6 d512 f512": (64, 6, 512, 512)}
Arrays = dict[str, np.ndarray]


def rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """Times against transformers and jax's ragged_dot with `peer`, else the rate alone."""
    for name, shape in SHAPES.items():
        for gradient in (False, True):
            what = f"cpu experts {name} {'forward + backward' if gradient else 'forward'} f32"
            if wanted(what):
                yield from _block_rows(what, shape, gradient, peer)


def _block_rows(what: str, shape: tuple[int, ...], gradient: bool, peer: bool) -> Iterator[Row]:
    _, top_k, width, ffn = shape
    arrays = _draw(*shape)
    ours = _jax_block(arrays, gradient, None)
    gflop = (18 if gradient else 6) * NUM_TOKENS * top_k * width * ffn / 1e9
    peak = measure_gemm_peak()
    seconds = statistics.median(timed(ours) for _ in range(NUM_PAIRS))
    how = f"median of {NUM_PAIRS}; matrix-product peak in this run {peak.gflops:.0f}"
    yield Row(f"{what}, rate", gflop / seconds, "GFLOP/s", how=how)
    if not peer:
        return
    in_turns = "times in turns, median of {} ratios"
    figure = f"{what}, against ragged_dot"
    try:
        ragged = _jax_block(arrays, gradient, "ragged_dot")
        ragged()
        ratio = paired(ours, lambda: timed(ragged), NUM_SLOW_PAIRS)
        how = in_turns.format(NUM_SLOW_PAIRS)
        yield Row(figure, ratio, "x", peer=1.0, peer_name="jax", how=how)
    except jax.errors.JaxRuntimeError as error:  # E64 backward: 27 GB
        yield Row(figure, None, "x", peer_name="jax", how=f"not measured: {error}")
    figure, rival = f"{what}, against grouped_mm", "transformers grouped_mm"
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        how = "not measured: pip install -e .[parity]"
        yield Row(figure, None, "x", f">= {GOAL}", None, rival, how)
        return
    for kept in (False, True):
        with Elsewhere(_torch_block, arrays, gradient, kept=kept) as theirs:
            ratio = paired(ours, theirs.seconds, NUM_PAIRS)
            rate = gflop / statistics.median(theirs.seconds() for _ in range(NUM_PAIRS))
        how = f"{in_turns.format(NUM_PAIRS)}, in two processes; it runs at {rate:.0f} GFLOP/s, "
        how += f"the best product in this run at {peak.gflops:.0f}"
        name = f"{figure}, its freed memory kept" if kept else figure
        yield Row(name, ratio, "x", "" if kept else f">= {GOAL}", 1.0, rival, how)


def _draw(num_experts: int, top_k: int, width: int, ffn: int) -> Arrays:
    rng = np.random.default_rng(0)
    experts = rng.random((NUM_TOKENS, num_experts)).argsort(axis=1)[:, :top_k]

    def normal(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[-2])).astype(np.float32)

    return {
        "x": rng.normal(size=(NUM_TOKENS, width)).astype(np.float32),
        "experts": experts.astype(np.int32),
        "weights": np.full((NUM_TOKENS, top_k), 1 / top_k, np.float32),
        "w_gate": normal(num_experts, width, ffn),
        "w_up": normal(num_experts, width, ffn),
        "w_down": normal(num_experts, ffn, width),
    }


def _jax_block(arrays: Arrays, gradient: bool, implementation: str | None) -> Callable[[], Any]:
    num_experts = len(arrays["w_gate"])

    def block(floats, experts):
        moves = plan(experts, num_experts)
        y = grouped_ffn(
            floats, dispatch(floats["x"], moves), moves.group_sizes_E, jax.nn.silu, implementation
        )
        return combine(y, floats["weights"], moves)

    def loss(floats, experts):
        return jnp.sum(block(floats, experts))

    compiled = jax.jit(jax.grad(loss) if gradient else block)
    floats = {k: jnp.asarray(v) for k, v in arrays.items() if k != "experts"}
    experts = jnp.asarray(arrays["experts"])
    return lambda: jax.block_until_ready(compiled(floats, experts))


def _torch_block(arrays: Arrays, gradient: bool) -> Callable[[], Any]:
    """transformers' own function on one of its expert modules, with as many threads as we have."""
    import torch
    from transformers.integrations.moe import grouped_mm_experts_forward
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    num_experts, width, ffn = arrays["w_gate"].shape
    config = MixtralConfig(hidden_size=width, intermediate_size=ffn, num_local_experts=num_experts)
    module = MixtralExperts(config)
    gate_up = np.concatenate([arrays["w_gate"], arrays["w_up"]], axis=2).transpose(0, 2, 1)
    with torch.no_grad():
        module.gate_up_proj.copy_(torch.from_numpy(gate_up.copy()))
        module.down_proj.copy_(torch.from_numpy(arrays["w_down"].transpose(0, 2, 1).copy()))
    x, weights = (torch.from_numpy(arrays[n]).requires_grad_(gradient) for n in ("x", "weights"))
    experts = torch.from_numpy(arrays["experts"].astype(np.int64))
    forward = functools.partial(grouped_mm_experts_forward, module, x, experts, weights)

    def backward():
        module.zero_grad()
        x.grad = weights.grad = None
        forward().sum().backward()

    def without_gradient():
        with torch.no_grad():
            return forward()

    return backward if gradient else without_gradient
