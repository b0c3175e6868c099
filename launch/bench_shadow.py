"""Rows of contextual sparsity: decoding that skips heads and neurons, timed and counted for TPUs.

Models of OPT-1.3B's and Llama-3.2-1B's shapes with random weights decode one text in float32, with
lists from a predictor of random weights that runs again for every token, or from two of every layer
(DejaVu's). On a GPU a larger one too, in bfloat16. The weights are far larger than any cache;
layers repeat two distinct ones, so that all candidates fit in memory side by side.
`launch.shadow_speed` says how times are taken.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import statistics
import tempfile
from collections.abc import Iterator

import jax

from launch.bench_row import Row, Wanted, measure_in_process
from launch.shadow_speed import Setup, Speed, asking, measure, num_threads, random_setup
from moejax.aot import cycles, topology
from moejax.core.chips import chip_of
from moejax.core.errors import InputError
from moejax.core.platform import platform
from moejax.models.families import by_name

SHAPES = {"opt-1.3b": "opt", "llama-3.2-1b": "llama"}
DISTINCT, BLOCK = 2, 64
GOALS = {0.5: ("", ">= 1.1"), 0.75: (">= 0.75", "")}  # sparsity -> share of the bound, ratio
# On a GPU, of which a token is a millisecond: tokens of a round, so that it is long enough.
GPU_SHAPES, GPU_TOKENS = SHAPES | {"llama-2-7b": "llama"}, 64
TOPOLOGY = "v5e:2x2"
CLOCK_HZ = 1.5e9  # of a v5e: 197 TFLOP/s over 131,072 operations per cycle


def rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """Per shape and sparsity the ratio to our dense decoding, the bound, and with `peer` theirs."""
    for shape, family in SHAPES.items():
        name = f"cpu {shape} f32 batch 1"
        if not wanted(name) and not any(wanted(f"{name}, {1 - s:.0%} kept") for s in GOALS):
            continue
        can = bool(importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"))
        setup = random_setup(shape, by_name(family).presets[shape], DISTINCT, BLOCK, 1)
        where = f"{num_threads()} threads, load average {os.getloadavg()[0]:.1f}"
        for speed in measure(setup, list(GOALS), peer and can):
            goals, who = GOALS[speed.sparsity], "transformers + torch" if peer else ""
            yield from _of(name, setup, speed, where, goals, who)
        for speed in measure(asking(setup), list(GOALS), False):
            goals, when = GOALS[speed.sparsity], ", decided in every layer"
            yield from _of(name, setup, speed, where, goals, "", when)


def _of(
    name: str,
    setup: Setup,
    speed: Speed,
    where: str,
    goals: tuple[str, str] = ("", ""),
    peer: str = "",
    when: str = "",
) -> Iterator[Row]:
    """where: it was timed. goals: for the share of the bound and for the ratio to dense."""
    figure, one = f"{name}, {1 - speed.sparsity:.0%} kept{when}", speed.to_json()
    share_goal, ratio_goal = goals
    rounds = speed.against_dense
    how = (
        f"{setup.num_tokens} tokens in turns, of {len(rounds)} ratios {_range(rounds)}, predictor "
        f"for every token included; {where}"
    )
    dense = f", dense {speed.dense_tokens_per_s:.1f}"
    yield Row(figure, speed.tokens_per_s, "tokens/s", how=how + dense)
    also = f"{_range(speed.against_dense_by_rows)} times dense decoding by rows"
    yield Row(f"{figure}, times our dense", one["against_dense"], "x", ratio_goal, how=also)
    bound = f"bytes of weights allow {speed.bound:.2f}x"
    yield Row(
        f"{figure}, share of the byte bound", one["share_of_bound"], "", share_goal, how=bound
    )
    if peer:
        ours = one["against_transformers"]
        how = _range(speed.against_transformers)
        how = how if ours else "not measured: pip install -e .[parity]"
        yield Row(f"{figure}, times transformers", ours, "x", "", 1.0 if ours else None, peer, how)


def _range(rounds: list[float]) -> str:
    if not rounds:
        return ""
    return f"{statistics.median(rounds):.2f} ({min(rounds):.2f} to {max(rounds):.2f})"


def gpu_rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """As `rows`, where the predictor is asked inside of every step."""
    del peer
    if platform() != "gpu":
        raise InputError("needs an NVIDIA GPU and pip install -e .[cuda12]")
    for shape, family in GPU_SHAPES.items():
        name = f"gpu {shape} bf16 batch 1"
        if any(wanted(f"{name}, {1 - s:.0%} kept") for s in GOALS):
            config = by_name(family).presets[shape]
            setup = random_setup(shape, config, DISTINCT, BLOCK, 1, "bfloat16")
            setup = dataclasses.replace(setup, at_token=True, num_tokens=GPU_TOKENS)
            for speed in measure(setup, list(GOALS), False):
                yield from _of(name, setup, speed, jax.devices()[0].device_kind)


def tpu_rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """A sparse layer's time on a v5e against XLA's dense one: the compiler's cycles, and bytes."""
    del peer
    for shape in SHAPES:
        figure = f"v5e {shape} layer bf16 batch 1, 50% kept, of XLA's dense layer's time"
        if not wanted(figure):
            continue
        found = {kind: _count(kind, shape) for kind in ("dense", "sparse")}
        times = {kind: layer_s(one) for kind, one in found.items()}
        dense, ours = found["dense"], found["sparse"]
        at_best = dense["bytes"] / chip_of(TOPOLOGY).hbm_bytes_per_s
        how = (
            f"max(cycles / clock, bytes / bandwidth): {times['sparse'] * 1e6:.1f} of "
            f"{times['dense'] * 1e6:.1f} us; {ours['cycles']:,.0f} and {dense['cycles']:,.0f} "
            f"cycles, {ours['bytes'] / 1e6:.1f} and {dense['bytes'] / 1e6:.1f} MB, predictor and "
            f"lists included. Of a dense layer that only waits for its bytes, as XLA's does from "
            f"two rows on: {times['sparse'] / at_best:.3f}. Compiled, not run"
        )
        yield Row(figure, times["sparse"] / times["dense"], "", "<= 0.6", how=how)


def layer_s(count: dict[str, float]) -> float:
    """Seconds that a layer takes at least: it computes while it reads."""
    return max(count["cycles"] / CLOCK_HZ, count["bytes"] / chip_of(TOPOLOGY).hbm_bytes_per_s)


@functools.cache
def _count(kind: str, shape: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        environment = topology.environment(TOPOLOGY) | cycles.environment(folder)
        module = "launch.bench_shadow_count"
        return measure_in_process(module, kind, shape, environment=environment, timeout_s=3600)
