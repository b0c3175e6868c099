"""Rows of a training step: SmolLM2-135M on the CPU or on an NVIDIA GPU, there an MoE too.

The rate is 6 N operations per token (N the parameters of all matrix products that a token meets,
the head among them) over the step's time, held against matrix products timed in turns with the
steps; the peer is transformers' model and optimizer on torch, also in turns, on a CPU in a process
of its own: once as its users find it, once with freed memory kept, as our commands keep it. On a
CPU all is float32 with Adafactor; on a GPU weights and AdamW's moments are float32 and products
bfloat16, for torch by autocast and its fused AdamW, with its fused attention. The MoE is
OLMoE-1B-7B's first four layers. Weights are random: time does not depend on them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.bench_row import Elsewhere, Program, Row, Wanted, paired, timed
from moejax.core.memory import give_back
from moejax.core.platform import platform
from moejax.models import flops, transformer
from moejax.models.config import ModelConfig
from moejax.models.families import FAMILIES, by_name
from moejax.models.transformer import ForwardOptions
from moejax.train.loss import lm_loss
from moejax.train.optim import OptimConfig, make_optimizer
from moejax.train.state import init_state
from moejax.train.step import make_train_step

NUM_PAIRS = 7


@dataclasses.dataclass(frozen=True)
class _Setting:
    """One model on one kind of machine: rows x length tokens a step."""

    name: str
    preset: str
    rows: int
    length: int
    dtype: str
    optimizer: str
    product: int  # size of the matrix products that are the peak
    goal: str = ""
    ratio_goal: str = ""
    num_layers: int = 0  # 0: all

    @property
    def figure(self) -> str:
        kind = {"float32": "f32", "bfloat16": "bf16"}[self.dtype]
        optimizer = {"adafactor": "Adafactor", "adamw": "AdamW"}[self.optimizer]
        return f"{self.name} {self.rows} x {self.length} {kind} {optimizer}"

    def config(self) -> ModelConfig:
        found = next(f.presets[self.preset] for f in FAMILIES if self.preset in f.presets)
        return dataclasses.replace(found, num_layers=self.num_layers or found.num_layers)


SETTINGS = {
    "cpu": (
        _Setting("cpu step SmolLM2-135M", "smollm2-135m", 4, 128, "float32", "adafactor", 2048,
                 ">= 60", ">= 1.2"),
    ),
    "gpu": (
        _Setting("gpu step SmolLM2-135M", "smollm2-135m", 8, 1024, "bfloat16", "adamw", 8192),
        _Setting("gpu step OLMoE-1B-7B, 4 layers", "olmoe-1b-7b", 8, 1024, "bfloat16", "adamw",
                 8192, num_layers=4),
    ),
}  # fmt: skip


def rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """The share of the matrix-product peak, and with `peer` the time against transformers."""
    for setting in SETTINGS.get(platform(), ()):
        yield from _rows(setting, peer, wanted)
        give_back()


def _rows(setting: _Setting, peer: bool, wanted: Wanted) -> Iterator[Row]:
    share = f"{setting.figure}, share of GEMM peak"
    ratio = f"{setting.figure}, against transformers + torch"
    if not (wanted(share) or (peer and wanted(ratio))):
        return
    config = setting.config()
    num_tokens = setting.rows * setting.length
    operations = 6 * _num_used(config) * num_tokens
    ours = _our_step(setting, config)
    if wanted(share):
        pairs = [_share(ours, operations, setting) for _ in range(NUM_PAIRS)]
        found = statistics.median(pair[0] for pair in pairs)
        step_s = statistics.median(pair[1] for pair in pairs)
        how = (
            f"6N {operations / 1e9:.0f} GFLOP in {step_s * 1e3:.1f} ms, {num_tokens / step_s:,.0f} "
            f"tokens/s; products of {setting.product} in turns, median of {NUM_PAIRS}"
        )
        yield Row(share, 100 * found, "%", setting.goal, how=how)
    if not (peer and wanted(ratio)):
        return
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        how = "not measured: pip install -e .[parity]"
        yield Row(ratio, None, "x", setting.ratio_goal, None, "transformers", how)
        return
    how = f"steps in turns, median of {NUM_PAIRS} ratios of times"
    if platform() != "cpu":  # one process: what one holds of a GPU's memory another cannot have
        try:
            theirs = _torch_step(setting, config)
            theirs()
            found = paired(ours, lambda: timed(theirs), NUM_PAIRS)
            yield Row(ratio, found, "x", setting.ratio_goal, 1.0, "transformers", how)
        except RuntimeError as error:  # torch's own, of memory too
            how = f"not measured: {error}"
            yield Row(ratio, None, "x", setting.ratio_goal, None, "transformers", how)
        return
    for kept in (False, True):
        with Elsewhere(_torch_step, setting, config, kept=kept) as peer_step:
            found = paired(ours, peer_step.seconds, NUM_PAIRS)
        figure = f"{ratio}, its freed memory kept" if kept else ratio
        goal = "" if kept else setting.ratio_goal
        yield Row(figure, found, "x", goal, 1.0, "transformers", f"{how}, in two processes")


def _num_used(config: ModelConfig) -> int:
    """Parameters that a token is multiplied by: a table that is only looked up in is not."""
    table = 0 if config.tie_embeddings else config.vocab_size * config.embed_size
    return flops.active_params(config) - table


def _our_step(setting: _Setting, config: ModelConfig) -> Program:
    """One update; the state is kept between calls."""
    optimizer = make_optimizer(OptimConfig(setting.optimizer), 1000)
    # Keeping less is faster, on a CPU and a GPU: what a scan keeps it copies.
    options = ForwardOptions(setting.dtype, "dots")
    step = make_train_step(
        lambda params, frozen, batch, rng: lm_loss(params, config, batch, rng, options), optimizer
    )
    init = functools.partial(transformer.init_params, config)
    state = [init_state(jax.jit(init)(jax.random.key(0)), optimizer)]
    shape = setting.rows, setting.length
    batch = {"tokens": _tokens(setting, config), "segment_ids": np.ones(shape, np.int32)}
    batch |= {"positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))}
    batch |= {"loss_mask": np.ones(shape, np.float32)}

    def run():
        state[0], metrics = step(state[0], {}, batch, jax.random.key(0))
        jax.block_until_ready((state[0], metrics))

    run()
    return run


def _share(step: Program, operations: float, setting: _Setting) -> tuple[float, float]:
    """The step's rate over that of products that take about as long, queued; and its seconds."""
    size = setting.product
    x = jax.random.normal(jax.random.key(0), (size, size), setting.dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    num = max(1, round(operations / (2 * size**3)))

    def products():
        for _ in range(num):
            made = product(x, x)
        made.block_until_ready()

    products_s, step_s = timed(products), timed(step)
    return (operations / step_s) / (num * 2 * size**3 / products_s), step_s


def _torch_step(setting: _Setting, config: ModelConfig) -> Program:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.optimization import Adafactor

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    family = by_name(config.family)
    values = {k: v for k, v in family.config_to_hf(config).items() if k != "model_type"}
    theirs = AutoConfig.for_model(family.model_type, **values)
    device = "cuda" if platform() == "gpu" else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(theirs, attn_implementation="sdpa").train()
    if setting.optimizer == "adafactor":
        fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        optimizer: Any = Adafactor(model.parameters(), lr=5e-5, **fixed)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    ids = torch.from_numpy(_tokens(setting, config).astype(np.int64)).to(device)
    low = setting.dtype == "bfloat16"

    def run():
        with torch.autocast(device, torch.bfloat16, enabled=low):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def _tokens(setting: _Setting, config: ModelConfig) -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = setting.rows, setting.length
    return rng.integers(0, config.vocab_size, shape).astype(np.int32)
