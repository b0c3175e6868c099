"""The train stage of `launch.graft`, and loading what it wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.graft_setup import (
    BRIDGE,
    TARGET,
    Setup,
    fresh_bridge,
    load_bridge,
    save_bridge,
    state_identity,
    state_rows,
)
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.data.grafting import GraftExample
from moejax.io import lineage
from moejax.io.load import load_any, save_any
from moejax.io.states import States
from moejax.methods import lora
from moejax.methods.graft_forward import grafted, make_reading, source_states
from moejax.serve.grafted import Grafted
from moejax.serve.prepare import prepare
from moejax.train.loop import RunInfo, TrainConfig, fit
from moejax.train.loss import targets, token_nll
from moejax.train.optim import OptimConfig

Say = Callable[[str], None]
TRAINED = ("all", "lora", "none")


def train(
    setup: Setup,
    examples: Sequence[GraftExample],
    heldout: Sequence[GraftExample],
    workdir: Path,
    say: Say,
) -> None:
    """Trains bridge and target, evaluates, writes WORKDIR/bridge and WORKDIR/target."""
    config = setup.config
    if config.target.train not in TRAINED:
        raise InputError(
            f"target.train {config.target.train!r} is unknown: use {', '.join(TRAINED)}"
        )
    loaded = load_any(config.target.model, "float32")
    trainable, frozen = split(setup, loaded.params)
    if not config.cache.use:
        frozen["source"] = setup.source_params()
    states = None
    if config.cache.use:
        both = [*examples, *heldout]
        states = States(workdir / "states", state_identity(setup, both), len(both))
    run = TrainConfig(
        config.train.steps,
        optim_config(setup),
        seed=config.train.seed,
        log_every=config.train.log_every,
        save_every=config.train.save_every,
        eval_every=config.train.eval_every,
    )
    say(f"trained  {tree.num_params(trainable):,} parameters, {config.train.steps} steps")
    sections = ("source", "target", "bridge", "data")
    result = fit(
        run,
        make_loss(setup),
        trainable,
        frozen,
        batches(setup, examples, states),
        workdir / "run",
        make_eval(setup, heldout, states, len(examples)),
        RunInfo("graft", {"config": {name: config[name].to_dict() for name in sections}}),
    )
    save(setup, loaded, result.params, workdir)
    say(f"written  {workdir}/{BRIDGE}")


def split(setup: Setup, params: tree.Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trained, frozen): the bridge always, the target as target.train says."""
    target = setup.config.target
    trainable: dict[str, Any] = {"bridge": fresh_bridge(setup)}
    if target.train == "all":
        return trainable | {"target": params}, {}
    if target.train == "lora":
        trainable["lora"] = lora.init_adapters(params, lora_config(setup))
    return trainable, {"target": jax.device_put(params)}


def lora_config(setup: Setup) -> lora.LoraConfig:
    """Of target.train = "lora"."""
    rank = setup.config.target.lora_rank
    return lora.LoraConfig(rank, 2.0 * rank)


def optim_config(setup: Setup) -> OptimConfig:
    """AdamW by default, with a rate for the bridge and one for the target (the reference's way)."""
    t = setup.config.train
    if t.lr <= 0:
        raise InputError(f"train.lr={t.lr} must be above 0")
    factor = t.target_lr / t.lr
    return OptimConfig(
        t.optimizer,
        t.lr,
        t.schedule,
        round(t.warmup_share * t.steps),
        t.clip_norm,
        t.weight_decay,
        lr_scale=() if setup.config.target.train == "none" else (
            (f"{'target' if setup.config.target.train == 'all' else 'lora'}/**", factor),
        ),
    )


def target_of(setup: Setup, trainable: tree.Tree, frozen: tree.Tree) -> tree.Tree:
    """The target's tree as it is run."""
    if "target" in trainable:
        return trainable["target"]
    if "lora" in trainable:
        return lora.attach(trainable["lora"], frozen["target"], lora_config(setup))
    return frozen["target"]


def make_loss(setup: Setup):
    """Next-token loss of the answers, through bridge and target alone."""
    options, config = setup.options, setup.target.config

    def loss_fn(trainable, frozen, batch, rng):
        del rng
        if "states" in batch:
            states = batch["states"]
        else:
            states = source_states(
                frozen["source"],
                setup.source.config,
                setup.graft.taps,
                batch["source_tokens"],
                options=options,
            )[0]
        hidden = run_target(setup, trainable, frozen, batch, states)
        target = target_of(setup, trainable, frozen)
        target_BT, weight_BT = targets(batch)
        count = jnp.sum(weight_BT)
        nll_BT = token_nll(target, config, hidden, target_BT)
        nll = jnp.sum(nll_BT * weight_BT) / jnp.maximum(count, 1.0)
        tokens = jnp.sum(batch["segment_ids"] > 0)
        return nll, {"nll": nll, "target_count": count, "token_count": tokens}

    return loss_fn


def run_target(setup: Setup, trainable, frozen, batch, states) -> jax.Array:
    """The target's last hidden states with the bridge in it."""
    dtype = setup.options.compute_dtype
    reading = make_reading(
        trainable["bridge"], setup.graft, states, batch["limits"], compute_dtype=dtype
    )
    return grafted(
        target_of(setup, trainable, frozen),
        setup.target.config,
        batch["tokens"],
        {"source": reading},
        positions_BT=batch["positions"],
        segment_ids_BT=batch["segment_ids"],
        options=setup.options,
    ).hidden_BTD


def batches(setup: Setup, examples: Sequence[GraftExample], states: States | None):
    """step -> rows: every text once per epoch, in an order of its own."""
    size = setup.config.train.batch_size
    if size > len(examples):
        raise InputError(f"train.batch_size={size} is more than the {len(examples)} texts")

    def batch(step: int) -> Mapping[str, np.ndarray]:
        per_epoch = len(examples) // size
        epoch, part = divmod(step, per_epoch)
        rng = np.random.default_rng([setup.config.data.seed, 3, epoch])
        numbers = rng.permutation(len(examples))[part * size :][:size].tolist()
        return rows_of(setup, examples, numbers, states)

    return batch


def rows_of(setup: Setup, examples, numbers: Sequence[int], states: States | None, first: int = 0):
    """Rows of some examples; their states are those of number + first."""
    rows = setup.batch([examples[n] for n in numbers])
    if states is not None:
        del rows["source_tokens"]
        rows["states"] = state_rows(setup, states, [n + first for n in numbers])
    return rows


def make_eval(setup: Setup, heldout: Sequence[GraftExample], states: States | None, first: int):
    """Mean loss of the held-out answers, nats per token."""
    loss = jax.jit(make_loss(setup))
    size = min(setup.config.train.batch_size, len(heldout))

    def evaluate(trainable, frozen) -> dict[str, float]:
        total = count = 0.0
        for at in range(0, len(heldout) - size + 1, size):
            rows = rows_of(setup, heldout, range(at, at + size), states, first)
            nll, metrics = loss(trainable, frozen, rows, None)
            total += float(nll) * float(metrics["target_count"])
            count += float(metrics["target_count"])
        return {"nll": total / max(count, 1.0)}

    return evaluate


# -- what was written ------------------------------------------------------------------------------


def save(setup: Setup, loaded, trained: tree.Tree, workdir: Path) -> None:
    """The tuned target first, then the bridge, which names it by its hash."""
    config, written = setup.config, setup
    if config.target.train != "none":
        if config.target.train == "all":
            params = jax.tree.map(np.asarray, trained["target"])
        else:
            params = lora.merge(trained["lora"], loaded.params, lora_config(setup))
        read = [lineage.input_of(name) for name in (config.source.model, config.target.model)]
        operations = lineage.append(loaded.lineage, "graft", read, config.to_dict())
        tuned = dataclasses.replace(loaded, params=params, lineage=operations)
        save_any(tuned, workdir / TARGET, "hf", overwrite=True)
        written = with_target(setup, workdir)
    save_bridge(written, trained["bridge"], workdir / BRIDGE, {})


def with_target(setup: Setup, workdir: Path) -> Setup:
    """The setup with the tuned target in the place of the one it came from."""
    if setup.config.target.train == "none":
        return setup
    config = setup.config.copy_and_resolve_references()
    config.target.model = str(workdir / TARGET)
    return dataclasses.replace(setup, config=config)


def load_trained(setup: Setup, workdir: Path) -> tuple[tree.Tree, tree.Tree]:
    """(bridge, the target's parameters) of a finished run."""
    tuned = with_target(setup, workdir)
    bridge = load_bridge(tuned, workdir / BRIDGE)
    return bridge, jax.device_put(load_any(tuned.config.target.model, "float32").params)


def load_pair(setup: Setup, workdir: Path) -> Grafted:
    """Both models and the bridge, ready to generate."""
    bridge, target = load_trained(setup, workdir)
    dtype = setup.config.compute.dtype
    return Grafted(
        setup.source.config,
        prepare(setup.source_params(), dtype),
        setup.target.config,
        prepare(target, dtype),
        setup.graft,
        bridge,
        setup.joined,
        setup.options,
    )


