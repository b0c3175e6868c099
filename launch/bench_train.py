"""Rows of a training step on the CPU: SmolLM2-135M, 4 x 128 tokens, float32, Adafactor.

The rate is 6 N operations per token (N the parameters of all matrix products, the head among them)
over the step's time, held against matrix products of 2048 timed in turns with the steps; the peer
is transformers' model and Adafactor on torch, also in turns. Weights are random: time does not
depend on them.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.bench_cpu import _timed
from launch.bench_row import Row, Wanted
from moejax.core import tree
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.models.families import FAMILIES
from moejax.models.families.llama import LLAMA
from moejax.models.transformer import ForwardOptions
from moejax.train.loss import lm_loss
from moejax.train.optim import OptimConfig, make_optimizer
from moejax.train.state import init_state
from moejax.train.step import make_train_step

ROWS, LENGTH, NUM_PAIRS, SIZE = 4, 128, 7, 2048
PRESET = "smollm2-135m"


def rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """The share of the matrix-product peak, and with `peer` the time against transformers."""
    what = "cpu step SmolLM2-135M 4 x 128 f32 Adafactor"
    share, ratio = f"{what}, share of GEMM peak", f"{what}, against transformers + torch"
    if not (wanted(share) or (peer and wanted(ratio))):
        return
    config = next(family.presets[PRESET] for family in FAMILIES if PRESET in family.presets)
    ours = _our_step(config)
    operations = 6 * tree.num_params(transformer.abstract_params(config)) * ROWS * LENGTH
    if wanted(share):
        found = statistics.median(_share(ours, operations) for _ in range(NUM_PAIRS))
        how = f"6N {operations / 1e9:.0f} GFLOP; products of {SIZE} in turns, median of {NUM_PAIRS}"
        yield Row(share, 100 * found, "%", ">= 60", how=how)
    if not (peer and wanted(ratio)):
        return
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        how = "not measured: pip install -e .[parity]"
        yield Row(ratio, None, "x", ">= 1.2", None, "transformers", how)
        return
    theirs = _torch_step(config)
    theirs()
    found = statistics.median(1 / (_timed(ours) / _timed(theirs)) for _ in range(NUM_PAIRS))
    how = f"steps in turns, median of {NUM_PAIRS} ratios of times"
    yield Row(ratio, found, "x", ">= 1.2", 1.0, "transformers", how)


def _our_step(config: ModelConfig) -> Callable[[], Any]:
    """One update; the state is kept between calls."""
    optimizer = make_optimizer(OptimConfig(), 1000)
    # Keeping less is faster here: what a scan keeps it copies.
    options = ForwardOptions(remat="dots")
    step = make_train_step(
        lambda params, frozen, batch, rng: lm_loss(params, config, batch, rng, options), optimizer
    )
    state = [init_state(transformer.init_params(config, jax.random.key(0)), optimizer)]
    batch = {"tokens": _tokens(config), "segment_ids": np.ones((ROWS, LENGTH), np.int32)}
    batch |= {"positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))}
    batch |= {"loss_mask": np.ones((ROWS, LENGTH), np.float32)}

    def run():
        state[0], metrics = step(state[0], {}, batch, jax.random.key(0))
        jax.block_until_ready((state[0], metrics))

    run()
    return run


def _share(step: Callable[[], Any], operations: float) -> float:
    """The step's rate over the rate of products that take about as long, one after the other."""
    x = jnp.ones((SIZE, SIZE))
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    num = max(1, round(operations / (2 * SIZE**3)))

    def products():
        for _ in range(num):
            product(x, x).block_until_ready()

    products_s = _timed(products)
    return (operations / _timed(step)) / (num * 2 * SIZE**3 / products_s)


def _torch_step(config: ModelConfig) -> Callable[[], Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.optimization import Adafactor

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = LlamaForCausalLM(LlamaConfig(**LLAMA.config_to_hf(config))).train()
    optimizer = Adafactor(
        model.parameters(), lr=5e-5, scale_parameter=False, relative_step=False, warmup_init=False
    )
    ids = torch.from_numpy(_tokens(config).astype(np.int64))

    def run():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _tokens(config: ModelConfig) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, config.vocab_size, (ROWS, LENGTH)).astype(np.int32)
