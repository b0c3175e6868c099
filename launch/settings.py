"""From a config to what the library takes: packed data, run settings, and the plan in words.

No flags here, so that every launcher (and a test) can use it.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import base
from launch import cli
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.memory import GIB, available_bytes
from moejax.data.load import DataConfig
from moejax.data.packing import Packed
from moejax.data.shared import RowsConfig, SharedData, load_shared
from moejax.evals import nll
from moejax.io.load import Loaded, main_dtype
from moejax.models import flops, transformer
from moejax.models.config import ModelConfig
from moejax.models.families import FAMILIES
from moejax.models.transformer import ForwardOptions
from moejax.moe.config import MoEConfig
from moejax.train.loop import TrainConfig
from moejax.train.memory import StepMemory, step_memory
from moejax.train.optim import OptimConfig, check_patterns, make_optimizer

PRESET = "preset:"
DTYPES = ("float32", "bfloat16", "float16")


def checked(config: ConfigDict | None, like: ConfigDict | None = None) -> ConfigDict:
    """The config if it has exactly the keys of `like` (None: configs/base.py); else InputError
    lists those."""
    if config is None:
        raise InputError(
            "--config is missing: name a file of configs/, as configs/quickstart_sft.py"
        )
    like = base.get_config() if like is None else like
    known, given = set(cli.leaf_keys(like)), set(cli.leaf_keys(config))
    for word, keys in (("lacks", known - given), ("has the unknown", given - known)):
        if keys:
            raise InputError(
                f"--config {word} {', '.join(sorted(keys))}; valid keys: {', '.join(sorted(known))}"
            )
    return config


# What folders of runs meant before config.json had these keys (None: either may lack it).
BEFORE = {"config.data.on_long": "truncate", "data.rows_sha256": None, "data.sha256": None}
BEFORE |= {"config.compute.overlap": None}


def load_rows(config: ConfigDict, loaded: Loaded) -> SharedData:
    """Reads, tokenises and packs the data of a config for a model, each process its share."""
    if loaded.tokenizer is None:
        raise InputError(f"{config.model.source} has no tokenizer: give a model with one")
    tokenizer, settings = loaded.tokenizer, config.data
    data = DataConfig(
        source=settings.source,
        split=settings.split,
        limit=settings.limit or None,
        heldout_share=settings.heldout_share,
        num_heldout=settings.num_heldout,
        seed=settings.seed,
    )
    rows = RowsConfig(settings.seq_len, tokenizer.pad_id, settings.on_long)
    return load_shared(data, tokenizer, rows)


def train_config(config: ConfigDict, num_rows: int | None) -> TrainConfig:
    """The run's settings; `num_rows` (None if unknown) turns epochs into steps."""
    settings = config.train
    for name, size, least in (
        ("train.batch_size", settings.batch_size, 1),
        ("train.accumulation", settings.accumulation, 1),
        ("data.seq_len", config.data.seq_len, 2),
    ):
        if size < least:
            raise InputError(f"{name} is {size}: it must be {least} or more")
    if (settings.steps > 0) == (settings.epochs > 0):
        raise InputError(
            f"train.steps is {settings.steps} and train.epochs {settings.epochs}: "
            "set one of the two, the other to 0"
        )
    steps = settings.steps
    if not steps:
        rows = settings.batch_size if num_rows is None else num_rows
        steps = math.ceil(settings.epochs * rows / settings.batch_size)
    if not 0 <= settings.warmup_share <= 1:
        raise InputError(f"train.warmup_share {settings.warmup_share} must lie between 0 and 1")
    optim = OptimConfig(
        name=settings.optimizer,
        lr=settings.lr,
        schedule=settings.schedule,
        warmup_steps=round(settings.warmup_share * steps),
        clip_norm=settings.clip_norm,
        weight_decay=settings.weight_decay,
        no_decay=patterns(settings.no_decay),
        lr_scale=_factors(settings.lr_scale),
    )
    best_metric = "nll" if settings.keep_best else ""
    names = ["accumulation", "accumulation_dtype", "max_skipped", "seed", "log_every"]
    names += ["save_every", "keep_last", "keep_every", "eval_every", "hang_s", "prefetch"]
    rest = {name: settings[name] for name in names}
    rest["overlap"] = config.compute.overlap
    return TrainConfig(steps, optim, best_metric=best_metric, **rest)


def patterns(text: str) -> tuple[str, ...]:
    """Comma-separated patterns of parameter paths."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _factors(text: str) -> tuple[tuple[str, float], ...]:
    found = []
    for part in patterns(text):
        pattern, _, number = part.rpartition("=")
        try:
            found.append((pattern, float(number)))
        except ValueError:
            raise InputError(f"train.lr_scale {part!r}: write PATTERN=FACTOR") from None
    return tuple(found)


def split_frozen(config: ConfigDict, params: tree.Tree) -> tuple[tree.Tree, tree.Tree]:
    """(trained, frozen) parameters, by train.freeze; every pattern has to fit something."""
    settings = config.train
    check_patterns(patterns(settings.freeze), params, "train.freeze")
    check_update_patterns(config, params)
    frozen, trained = tree.split(params, patterns(settings.freeze))
    if not trained:
        raise InputError(f"train.freeze {settings.freeze!r} leaves nothing to train")
    return trained, frozen


def check_update_patterns(config: ConfigDict, params: tree.Tree) -> None:
    """InputError for a pattern of train.no_decay or train.lr_scale that fits no parameter."""
    check_patterns(patterns(config.train.no_decay), params, "train.no_decay")
    scaled = [pattern for pattern, _ in _factors(config.train.lr_scale)]
    check_patterns(scaled, params, "train.lr_scale")


def check_heldout(settings: TrainConfig, rows: SharedData) -> None:
    """InputError for a run that is to keep its best and has nothing to judge it by."""
    if settings.best_metric and rows.heldout is None:
        raise InputError("train.keep_best needs held-out data: raise data.heldout_share above 0")


def forward_options(config: ConfigDict) -> ForwardOptions:
    """How to compute."""
    compute = config.compute
    if compute.dtype not in DTYPES:
        raise InputError(f"compute.dtype {compute.dtype!r} is unknown: use {', '.join(DTYPES)}")
    return ForwardOptions(compute.dtype, compute.remat, compute.moe_implementation or None)


def preset_named(source: str) -> ModelConfig:
    """The sizes that a ``preset:NAME`` source stands for."""
    name = source.removeprefix(PRESET)
    presets = {key: value for family in FAMILIES for key, value in family.presets.items()}
    if name not in presets:
        raise InputError(f"no preset {name!r}: there are {', '.join(sorted(presets))}")
    return presets[name]


def preset(config: ConfigDict) -> ModelConfig:
    """The preset of a config, with the experts that it asks for."""
    model = preset_named(config.model.source)
    if config.model.experts:
        model = dataclasses.replace(model, moe=MoEConfig(config.model.experts, config.model.top_k))
    return model


def with_dtype(config: ConfigDict, params: tree.Tree | None) -> ConfigDict:
    """The config, model.dtype "keep" being what most of the model's parameters have.

    InputError without parameters (None): a preset has no dtype to keep.
    """
    if config.model.dtype != "keep":
        return config
    if params is None:
        raise InputError('model.dtype "keep" needs a model: of a preset say float32 or bfloat16')
    config = copy.deepcopy(config)
    config.model.dtype = main_dtype(params).name
    return config


def step_flops_of(config: ConfigDict, model: ModelConfig) -> float:
    """FLOPs of one update, without the weights' gradients of what train.freeze names."""
    num_tokens = config.train.batch_size * config.data.seq_len
    return flops.train_flops(model, num_tokens, config.data.seq_len, patterns(config.train.freeze))


def describe(
    config: ConfigDict, model: ModelConfig, settings: TrainConfig, rows: SharedData | None
) -> list[str]:
    """The plan in lines: model, data, steps, arithmetic."""
    seq_len, batch_size = config.data.seq_len, config.train.batch_size
    experts = f", {model.moe.num_experts} experts, top {model.moe.top_k}" if model.moe else ""
    lines = [
        f"model    {config.model.source}: {flops.num_params(model):,} parameters, "
        f"{flops.active_params(model):,} active{experts}, {config.model.dtype}"
    ]
    if rows is not None:
        stats = rows.train.stats
        lines.append(
            f"data     {config.data.source}: {stats.num_examples} conversations in "
            f"{stats.num_rows} rows of {seq_len} ({stats.padding_share:.0%} padding, "
            f"{stats.num_split} split over rows, {stats.num_truncated} truncated, "
            f"{stats.num_dropped} dropped), "
            f"{rows.heldout.stats.num_examples if rows.heldout else 0} held out; "
            f"{rows.examples.num_read} of {len(rows.examples.entries)} read by this process"
        )
    step_flops = step_flops_of(config, model)
    steps = settings.steps if rows is not None or config.train.steps else None
    total = f"{steps} steps, {steps * step_flops:.3g} FLOPs in all; " if steps else ""
    optim = settings.optim
    lines.append(
        f"steps    {total}{batch_size} x {seq_len} tokens in {settings.accumulation} part(s), "
        f"{step_flops:.3g} FLOPs each; {optim.name}, lr {optim.lr:g} {optim.schedule}, "
        f"{optim.warmup_steps} warm-up; {config.compute.dtype}, remat {config.compute.remat}"
    )
    return lines


def plan_memory(config: ConfigDict, model: ModelConfig, settings: TrainConfig, loss) -> StepMemory:
    """Memory of a training step, from shapes alone."""
    params = transformer.abstract_params(model, config.model.dtype)
    return plan_step(config, settings, loss, *split_frozen(config, params))


def plan_step(
    config: ConfigDict, settings: TrainConfig, loss, trained: tree.Tree, frozen: tree.Tree
) -> StepMemory:
    """Of a step that trains these parameters, arrays or shapes, on rows of the config's size."""
    shape = (config.train.batch_size, config.data.seq_len)
    if shape[0] % settings.accumulation:
        raise InputError(
            f"train.batch_size {shape[0]} cannot be cut into train.accumulation="
            f"{settings.accumulation} equal parts: choose a divisor"
        )
    names = ("tokens", "segment_ids", "positions", "loss_mask")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    optimizer = make_optimizer(settings.optim, settings.steps)
    parts = settings.accumulation, settings.accumulation_dtype
    return step_memory(loss, optimizer, trained, frozen, batch, *parts)


def heldout_nll(
    config: ConfigDict, params: tree.Tree, model: ModelConfig, heldout: Packed, how: ForwardOptions
) -> float:
    """Held-out nats per answer token. A forward pass on a microbatch's rows, with logits of at most
    compute.max_logit_mib: where a training step fits, so does this."""
    rows = config.train.batch_size // config.train.accumulation
    memory = config.compute.max_logit_mib * 2**20
    found = nll.evaluate(
        params, model, heldout, batch_size=rows, options=how, max_logit_bytes=memory
    )
    return float(found.sums.sum() / found.counts.sum())


def describe_memory(memory: StepMemory) -> str:
    """One line, in GiB, with what this machine has."""
    parts = ", ".join(
        f"{name} {value / GIB:.2f}" for name, value in dataclasses.asdict(memory).items() if value
    )
    free = available_bytes() / GIB
    return f"memory   about {memory.total / GIB:.2f} GiB ({parts}); {free:.1f} GiB free here"
