"""The train stage of `launch.graft`, and loading what it wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch.graft_loss import BRIDGED, DISTILLED, lora_config, make_loss, trained_parts
from launch.graft_policy import on_policy
from launch.graft_setup import (
    BRIDGE,
    TARGET,
    Setup,
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
from moejax.serve.grafted import Grafted, Lender
from moejax.serve.prepare import prepare
from moejax.train.loop import EvalFn, FitResult, RunInfo, TrainConfig, fit
from moejax.train.optim import OptimConfig

Say = Callable[[str], None]


def train(
    setup: Setup,
    examples: Sequence[GraftExample],
    heldout: Sequence[GraftExample],
    workdir: Path,
    say: Say,
) -> None:
    """Trains bridge and target, evaluates, writes WORKDIR/bridge and WORKDIR/target."""
    config = setup.config
    loaded = load_any(config.target.model, "float32")
    states = None
    if config.cache.use:
        both = [*examples, *heldout]
        states = States(workdir / "states", state_identity(setup, both), len(both))
    result = fit_method(
        setup, loaded.params, (examples, states), workdir / "run",
        make_eval(setup, heldout, states, len(examples)), say,
    )
    save(setup, loaded, result.params, workdir)
    say(f"written  {workdir}/{BRIDGE}")


def fit_method(
    setup: Setup,
    params: tree.Tree,
    data: tuple[Sequence[GraftExample], States | None],
    folder: Path,
    evaluate: EvalFn | None,
    say: Say,
    quiet: bool = False,
) -> FitResult:
    """Trains what config.method says, from the target's `params`; data: texts and their states."""
    config, (examples, states) = setup.config, data
    trainable, frozen = trained_parts(setup, params)
    if states is None or config.method == "gkd":
        frozen["source"] = setup.source_params()
    if config.method in DISTILLED:
        whole = frozen.get("source") or setup.source_params()
        head = {n: whole[n] for n in ("embed", "lm_head") if n in whole}
        frozen["source_head"] = jax.device_put(jax.device_get(head))
        del whole
    t, steps = config.train, num_steps(setup, len(examples))
    run = TrainConfig(
        steps,
        optim_config(setup, steps),
        seed=t.seed,
        log_every=t.log_every,
        save_every=t.save_every,
        eval_every=t.eval_every,
    )
    say(f"trained  {tree.num_params(trainable):,} parameters, {steps} steps, {config.method}")
    feed = batches(setup, examples, states)
    own_texts = config.method == "gkd"
    if own_texts:
        feed = on_policy(setup, feed, frozen)
        if states is not None:
            del frozen["source"]  # the loss reads the states that come with the rows
    sections = ("source", "target", "bridge", "data", "distill")
    identity = {name: config[name].to_dict() for name in sections} | {"method": config.method}
    return fit(
        run, make_loss(setup), trainable, frozen, feed, folder, evaluate,
        RunInfo("graft", {"config": identity}, quiet=quiet, on_policy=own_texts),
    )


def num_steps(setup: Setup, num_texts: int) -> int:
    """Of train.steps or train.epochs; InputError unless exactly one of them is set."""
    t = setup.config.train
    if (t.steps > 0) == (t.epochs > 0):
        raise InputError(
            f"train.steps is {t.steps} and train.epochs {t.epochs}: set one of the two, the other "
            "to 0"
        )
    return t.steps or max(1, num_texts // t.batch_size) * t.epochs


def optim_config(setup: Setup, steps: int) -> OptimConfig:
    """AdamW by default, with a rate for the bridge and one for the target (the reference's way)."""
    t = setup.config.train
    if t.lr <= 0:
        raise InputError(f"train.lr={t.lr} must be above 0")
    factor = t.target_lr / t.lr
    return OptimConfig(
        t.optimizer,
        t.lr,
        t.schedule,
        round(t.warmup_share * steps),
        t.clip_norm,
        t.weight_decay,
        lr_scale=() if setup.config.target.train == "none" else (
            (f"{'target' if setup.config.target.train == 'all' else 'lora'}/**", factor),
        ),
    )


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
    if setup.config.method == "shuffled":
        shuffle(rows, [examples[n] for n in numbers])
    return rows


def shuffle(rows: dict[str, Any], examples: Sequence[GraftExample]) -> None:
    """Every text gets the source of the one before it, no more of it than that one has."""
    for name in ("states", "source_tokens"):
        if name in rows:
            rows[name] = np.roll(rows[name], 1, axis=0)
    lengths = np.roll([len(e.source_ids) for e in examples], 1).astype(np.int32)
    rows["limits"] = np.minimum(rows["limits"], lengths[:, None])


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
    kept = trained["bridge" if "bridge" in trained else "adapters"]
    save_bridge(written, kept, workdir / BRIDGE)


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
    if setup.config.method not in BRIDGED:
        raise InputError(f"method {setup.config.method!r} has no bridge to generate with")
    bridge, target = load_trained(setup, workdir)
    dtype = setup.config.compute.dtype
    lender = Lender(
        setup.source.config,
        prepare(setup.source_params(), dtype),
        setup.graft,
        bridge,
        setup.joined,
    )
    return Grafted(setup.target.config, prepare(target, dtype), {"source": lender}, setup.options)
