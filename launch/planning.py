"""From a config to the plan of its step on a topology, and to the changes worth trying."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict

from configs.esft import base as esft_base
from launch.esft_plan import esft_program, trained_share
from launch.program import make_mesh_of, make_program
from launch.settings import PRESET, patterns, preset, train_config, with_dtype
from moejax.aot.estimate import Setup, estimate, estimate_time
from moejax.aot.plan import Plan, describe_hbm, failed_plan, read_plan
from moejax.aot.remedies import describe, remedies
from moejax.core.chips import CHIPS, Chip, chip_of, chip_of_kind
from moejax.core.errors import InputError
from moejax.core.memory import available_bytes
from moejax.core.mesh import AXES
from moejax.io.load import load_any
from moejax.models import options
from moejax.models.config import ModelConfig
from moejax.moe.choose import choose, load_of

Keys = dict[str, Any]
REMAT = ("nothing", "dots", "full")
# Beside these the one asked for: "capacity" drops, "ragged" takes memory for the worst case.
STRATEGIES = ("chunked", "all_gather")
MAX_BATCH_FACTOR = 4


def model_of(config: ConfigDict) -> tuple[ModelConfig, ConfigDict]:
    """The sizes of a config's model, of its folder or file, else of the preset it names; and the
    config with the model's dtype."""
    source = config.model.source
    if source.startswith(PRESET):
        return preset(config), with_dtype(config, None)
    if source and Path(source).exists():
        loaded = load_any(source, config.model.dtype, abstract=True)
        return loaded.config, with_dtype(config, loaded.params)
    if config.model.preset:
        named = copy.deepcopy(config)
        named.model.source = PRESET + config.model.preset
        return preset(named), with_dtype(config, None)
    raise InputError(
        f"--config.model.source={source}: not on this machine, so its sizes are unknown: give a "
        "folder or file that is, or --config.model.preset=NAME"
    )


def setup_of(config: ConfigDict, model: ModelConfig, sizes: Mapping[str, int], chip: Chip) -> Setup:
    """What the estimates need of a config on a mesh."""
    settings = train_config(config, None)
    return Setup(
        model=model,
        chip=chip,
        mesh=dict(sizes),
        batch_size=config.train.batch_size,
        seq_len=config.data.seq_len,
        accumulation=settings.accumulation,
        optim=settings.optim,
        param_dtype=config.model.dtype,
        compute_dtype=config.compute.dtype,
        remat=config.compute.remat,
        strategy=config.compute.moe_strategy,
        freeze=patterns(config.train.freeze),
        accumulation_dtype=settings.accumulation_dtype,
        max_logit_mib=config.compute.max_logit_mib,
        trained_share=_trained_share(config, model) if "method" in config else 1.0,
    )


def _trained_share(config: ConfigDict, model: ModelConfig) -> float:
    """Of a config of ESFT; 1 as long as its experts are not chosen."""
    method = config.method
    if method.name == "esft" and not method.experts:
        return 1.0
    return _share_of(json.dumps(method.to_dict(), sort_keys=True), model)


@functools.lru_cache(maxsize=16)
def _share_of(method: str, model: ModelConfig) -> float:
    config = esft_base.get_config()
    config.method.update(json.loads(method))
    return trained_share(config, model)


def describe_exchange(setup: Setup) -> str:
    """How tokens travel to experts on another device, and if "auto" chose it why; may be empty."""
    moe, shards = setup.model.moe, setup.mesh["expert"]
    if moe is None or shards == 1:
        return ""
    if setup.strategy != "auto":
        return f"exchange by {setup.strategy}"
    rows = setup.batch_size // setup.accumulation
    shape = (rows, setup.seq_len, setup.model.d_model)
    load = load_of(moe, setup.mesh, shape, moe.expert_ffn or setup.model.d_ff)
    chip = setup.chip.name if setup.chip.name in CHIPS else "v5p"
    return "exchange by " + choose(load, chip).reason


def changed(config: ConfigDict, keys: Mapping[str, Any]) -> ConfigDict:
    """A copy of a config with dotted keys set."""
    made = copy.deepcopy(config)
    for key, value in keys.items():
        section, name = key.split(".")
        made[section][name] = value
    return made


def plan(
    config: ConfigDict,
    model: ModelConfig,
    devices: Sequence[jax.Device],
    chip: Chip,
    effort: float = 0.0,
) -> tuple[Plan, Setup, str]:
    """Compiles a config's step for devices that are not here. The text is the compiled program.

    effort: XLA's, for time and memory, from -1 (quick to compile, slower to run) to 1.
    """
    mesh = make_mesh_of(config, model, devices)
    setup = setup_of(config, model, mesh.shape, chip)
    program = (esft_program if "method" in config else make_program)(config, model, mesh)
    start = time.perf_counter()
    try:
        compiled = program.lower().compile(compiler_options=_options(effort))
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return failed_plan(setup, error, time.perf_counter() - start), setup, ""
    seconds = time.perf_counter() - start
    text = compiled.as_text() or ""
    return read_plan(program, compiled, setup, seconds, text), setup, text


def _options(effort: float) -> dict[str, Any] | None:
    names = ("exec_time_optimization_effort", "memory_fitting_effort")
    return dict.fromkeys(names, effort) if effort else None


def candidates(
    config: ConfigDict, model: ModelConfig, topology: str, num_devices: int
) -> list[tuple[Keys, Setup]]:
    """Every change of mesh, batch, remat and strategy that divides evenly; the fastest first.

    By estimated tokens per second; within 2 % of each other by what the network and HBM carry,
    which no run hides for nothing. Those that do not fit come last.
    """
    chip = chip_of(topology)
    found: list[tuple[bool, int, float, int, Keys, Setup]] = []
    for keys in _variants(config, model, num_devices):
        setup = setup_of(
            changed(config, keys), model, {axis: keys[f"mesh.{axis}"] for axis in AXES}, chip
        )
        try:
            fits, line = estimate(setup).used <= chip.hbm_bytes, estimate_time(setup)
        except InputError:  # a width does not divide by that mesh
            continue
        tokens = setup.batch_size * setup.seq_len
        pace = round(50 * math.log(line.step_s / tokens))
        carried_s = (line.memory_s + line.network_s) / tokens
        found.append((not fits, pace, carried_s, len(found), keys, setup))
    return [(keys, setup) for *_, keys, setup in sorted(found, key=lambda row: row[:4])]


def chosen_candidates(
    found: Sequence[tuple[Keys, Setup]],
    fit: Callable[[Keys, Setup], float],
    most: int,
) -> list[int]:
    """Which candidates to compile: the best that fit, up to `most`, learning from what was.

    fit(keys, setup) compiles one and gives the bytes it takes over those that were reckoned; of
    the rest, those are passed over that the largest such factor does not let fit.
    """
    chosen: list[int] = []
    factor = 1.0
    for number, (keys, setup) in enumerate(found):
        if len(chosen) == most:
            break
        if not chosen or factor * estimate(setup).used <= setup.chip.hbm_bytes:
            chosen.append(number)
            factor = max(factor, fit(keys, setup))
    return chosen


def _variants(config: ConfigDict, model: ModelConfig, num_devices: int) -> Iterator[Keys]:
    remats = sorted({*REMAT, config.compute.remat} - {"none"}, key=options.REMAT.index)
    asked = {config.compute.moe_strategy} - {*STRATEGIES, "auto", "local"}
    strategies = ("auto",) if model.moe is None else (*STRATEGIES, *asked)
    batch = config.train.batch_size
    batches = [batch * 2**n for n in range(MAX_BATCH_FACTOR.bit_length())]
    for sizes in _meshes(model, num_devices):
        parts = sizes[0] * sizes[1] * sizes[2]
        named = {f"mesh.{axis}": size for axis, size in zip(AXES, sizes, strict=True)}
        for rows, remat, strategy in itertools.product(batches, remats, strategies):
            if sizes[2] == 1 and strategy != strategies[0]:
                continue
            for accumulation in (1, 2, 4, 8, 16):
                if rows % accumulation or (rows // accumulation) % parts:
                    continue
                yield named | {
                    "train.batch_size": rows,
                    "train.accumulation": accumulation,
                    "compute.remat": remat,
                    "compute.moe_strategy": strategy if sizes[2] > 1 else "auto",
                }


def _meshes(model: ModelConfig, num_devices: int) -> Iterator[tuple[int, int, int, int]]:
    """Sizes of the axes: "expert" where it divides the experts, "tensor" up to 8."""
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    experts = [1] if model.moe is None else [n for n in divisors if model.moe.num_experts % n == 0]
    for expert, tensor in itertools.product(experts, (1, 2, 4, 8)):
        rest, over = divmod(num_devices, expert * tensor)
        if over or not rest:
            continue
        for data in (n for n in divisors if rest % n == 0):
            yield data, rest // data, expert, tensor


def explainer(
    config: ConfigDict, model: ModelConfig, share: float | None = None
) -> Callable[[int | None], list[str]]:
    """For `launch.out_of_memory`: the memory table of a config's run here, and the remedies.

    share: `Setup.trained_share`, where the config does not say it.
    """

    def explain(asked: int | None) -> list[str]:
        chip = this_chip()
        setup = setup_of(config, model, make_mesh_of(config, model).shape, chip)
        if share is not None:
            setup = dataclasses.replace(setup, trained_share=share)
        hbm = estimate(setup)
        # What is held and what was asked for did not fit, whatever the estimate says.
        held = sum(array.nbytes for array in jax.live_arrays()) // setup.num_devices
        required = max(hbm.used, held + (asked or 0), chip.hbm_bytes + chip.hbm_bytes // 20)
        found = remedies(setup, required)
        lines = describe_hbm(hbm)
        if not found:
            return [*lines, "no key of this config is known to help: more devices, or larger ones"]
        lines.append("change, one after the other, until it fits (reckoned, not measured):")
        return lines + [f"  {line}" for line in describe(found, chip.hbm_bytes)]

    return explain


def this_chip() -> Chip:
    """The devices of this process, with the rates of a chip of their kind, or of a slow one."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    size = int(stats.get("bytes_limit", available_bytes() // jax.local_device_count()))
    known = chip_of_kind(device.device_kind)
    if known is not None:
        return dataclasses.replace(known, hbm_bytes=size)
    kind = device.device_kind.lower()
    return Chip(kind, size, flops_per_s=2e11, hbm_bytes_per_s=2e10, link_bytes_per_s=1e10)


def free_memory() -> None:
    """Lets go of what compiling left behind, before the next one."""
    jax.clear_caches()
    gc.collect()
