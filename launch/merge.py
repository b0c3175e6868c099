"""Merges a mixture of experts back into a dense model of the original size.

    python -m launch.merge --source=runs/moe/model --target=runs/merged --mode=uniform --lam=0.75
    python -m launch.merge --source=runs/moe/model --target=runs/merged --workdir=runs/merge \\
        --config=configs/quickstart_merge.py
    python -m launch.merge --source=runs/moe/model --target=runs/best --mode=grid \\
        --lams=0.5,0.75,1 --config=configs/quickstart_merge.py

learned      coefficients by the language-model loss on --config's data, all else frozen
uniform      equal coefficients: the control for a learned merge
shared_only  the shared expert alone
grid         equal coefficients, the lambda of --lams with the lowest held-out loss

A learned merge whose --workdir is there goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from launch import cli, out_of_memory, stage_memory
from launch.settings import (
    BEFORE,
    check_heldout,
    check_update_patterns,
    checked,
    describe,
    describe_memory,
    forward_options,
    heldout_nll,
    load_rows,
    plan_step,
    train_config,
)
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.data.loader import batches
from moejax.data.packing import Packed
from moejax.data.shared import SharedData
from moejax.io import atomic, lineage
from moejax.io.load import FORMATS, Loaded, load_any, save_any
from moejax.methods import merge as merging
from moejax.methods.merge import MergeConfig
from moejax.models import flops
from moejax.models.config import ModelConfig
from moejax.train.loop import FitResult, RunInfo, TrainConfig, fit, load_best
from moejax.train.loss import lm_loss
from moejax.train.memory import StepMemory
from moejax.train.peak import measure_gemm_peak

SOURCE = flags.DEFINE_string("source", None, "Folder of a mixture of experts.", required=True)
TARGET = flags.DEFINE_string("target", None, "Folder to make.", required=True)
MODE = flags.DEFINE_enum(
    "mode", "learned", ["learned", "uniform", "shared_only", "grid"], "How experts are weighed."
)
LAM = flags.DEFINE_float("lam", MergeConfig.lam, "Lambda: weight of the shared expert, 0 to 1.")
LAMS = flags.DEFINE_list("lams", ["0.5", "0.6", "0.7", "0.75", "0.8", "0.9", "1"], "For grid.")
LEARN_LAMBDA = flags.DEFINE_bool(
    "learn_lambda", False, "Learn lambda too; it tends to collapse onto the shared expert."
)
PER_MATRIX = flags.DEFINE_bool(
    "per_matrix", False, "Coefficients for each of gate, up and down, not one set per layer."
)
CONFIG = config_flags.DEFINE_config_file("config", None, "Data and steps for learned and grid.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a learned merge's run; resumed.")
FORMAT = flags.DEFINE_enum("format", "hf", FORMATS, "hf: for transformers; orbax: moejax's own.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a model folder at the target.")

Merged = tuple[tree.Tree, dict[str, Any]]  # dense parameters, what to record


def main(argv) -> None:
    del argv
    merge = MergeConfig(LAM.value, LEARN_LAMBDA.value, PER_MATRIX.value)
    atomic.check_target(TARGET.value, OVERWRITE.value)
    plan = load_any(SOURCE.value, abstract=True)
    dense = merging.dense_config(plan.config)
    needs_data = MODE.value in ("learned", "grid")
    config = checked(CONFIG.value) if needs_data else None
    if MODE.value == "learned" and WORKDIR.value is None and not cli.DRY_RUN.value:
        raise InputError("--workdir is missing: name the folder that the run is kept in")
    print(
        f"merge    {SOURCE.value}: {flops.num_params(plan.config):,} parameters into "
        f"{flops.num_params(dense):,}, {MODE.value}"
        + (f", lambda {merge.lam:g}" if MODE.value in ("learned", "uniform") else "")
    )
    if config is None:
        if cli.DRY_RUN.value:
            print("dry run: nothing written")
            return
        loaded = load_any(SOURCE.value)
        save(loaded, merge_at_once(loaded, merge), merge)
        return
    # A dry run reads no weights: shapes are enough to plan.
    loaded = load_any(SOURCE.value, config.model.dtype, abstract=cli.DRY_RUN.value)
    config.model.source = SOURCE.value
    merged = (learn if MODE.value == "learned" else search)(config, loaded, merge)
    if merged is None:
        print("dry run: nothing trained, nothing written")
    else:
        save(loaded, merged, merge)


def merge_at_once(loaded: Loaded, merge: MergeConfig) -> Merged:
    """Nothing to learn: uniform, or the shared expert."""
    if MODE.value == "shared_only":
        return merging.shared_only(loaded.params, loaded.config)[0], {}
    start = merging.init_coefficients(loaded.config, merge)
    return merging.merge_experts(loaded.params, loaded.config, start, merge)[0], {}


def search(config: ConfigDict, loaded: Loaded, merge: MergeConfig) -> Merged | None:
    """Equal coefficients for each lambda of --lams; the one of the lowest held-out loss."""
    del merge
    lams = [_number(text) for text in LAMS.value]
    heldout = _heldout(load_rows(config, loaded))
    if cli.DRY_RUN.value:
        return None
    params = jax.device_put(loaded.params)
    found, dense = {}, merging.dense_config(loaded.config)
    for lam, merged in merging.lambda_grid(params, loaded.config, lams):
        found[lam] = heldout_nll(config, merged, dense, heldout, forward_options(config))
        print(f"lambda   {lam:<5g} held-out {found[lam]:.4f} nats a token", flush=True)
    best = min(found, key=lambda lam: found[lam])
    print(f"best     {best:g}, chosen on the held-out data that it is measured on")
    record = {"lam": best, "heldout_nll": {f"{lam:g}": value for lam, value in found.items()}}
    return merging.uniform(params, loaded.config, best)[0], record


def learn(config: ConfigDict, loaded: Loaded, merge: MergeConfig) -> Merged | None:
    """Trains the coefficients alone, in --workdir, and merges with them."""
    model, rows = loaded.config, load_rows(config, loaded)
    settings = train_config(config, len(rows.train))
    check_heldout(settings, rows)
    if config.train.freeze:
        raise InputError(
            f"train.freeze {config.train.freeze!r} is not read here: merging trains its "
            "coefficients alone, leave it empty"
        )
    loss = _loss(config, model, merge)
    start = merging.init_coefficients(model, merge)
    check_update_patterns(config, start)
    for line in describe(config, model, settings, rows)[:2]:
        print(line)
    print(describe_stage(config, loaded, settings, merge), flush=True)
    if cli.DRY_RUN.value:
        return None

    def memory_of(changed: ConfigDict):
        return plan(changed, loaded, train_config(changed, len(rows.train)), merge)

    out_of_memory.explain_with(stage_memory.explainer(config, memory_of))
    frozen = jax.device_put(loaded.params)
    result = run(config, (model, merge, rows), settings, (loss, start, frozen))
    best = settings.best_metric and result.best_step != result.step
    coefficients = load_best(str(WORKDIR.value), result.params) if best else result.params
    lists = jax.tree.map(lambda x: np.asarray(x).tolist(), coefficients)
    atomic.write_json(Path(str(WORKDIR.value)) / "coefficients.json", lists)
    departures = merging.describe(model, coefficients, merge)
    for name, values in departures.items():
        print(
            f"learned  run {name}: coefficients within {values['max_relative_departure']:.2%} "
            "of equal; compare with --mode=uniform"
        )
    record = {"step": result.step, "last_loss": result.last_loss}
    record |= {"train_tokens": result.train_tokens, "wall_s": round(result.wall_s, 1)}
    merged, _ = merging.merge_experts(frozen, model, coefficients, merge)
    return merged, record | {"coefficients": departures}


def run(config: ConfigDict, job: tuple, settings: TrainConfig, trees: tuple) -> FitResult:
    """The merge stage in --workdir."""
    (model, merge, rows), (loss, start, frozen) = job, trees
    peak = measure_gemm_peak(config.compute.dtype)
    print(f"machine  {peak.gflops:,.0f} GFLOP/s in {peak.dtype} matrix products, {peak.device}")
    sections = ("model", "data", "compute")
    identity = {
        "config": {name: config[name].to_dict() for name in sections},
        "batch_size": config.train.batch_size,
        "merge": dataclasses.asdict(merge),
        "data": rows.summary,
    }

    def evaluate(coefficients, frozen):
        merged, dense = merging.merge_experts(frozen, model, coefficients, merge)
        return {"nll": heldout_nll(config, merged, dense, rows.heldout, forward_options(config))}

    return fit(
        settings,
        loss,
        start,
        frozen,
        batches(rows.train, config.train.batch_size, config.data.seed),
        str(WORKDIR.value),
        evaluate if rows.heldout is not None else None,
        RunInfo("merge", identity, _step_flops(config, model), peak, before=BEFORE),
    )


def plan(
    config: ConfigDict, loaded: Loaded, settings: TrainConfig, merge: MergeConfig
) -> StepMemory:
    """Memory of a step of the merge stage, from shapes alone."""

    def at_rest(w):
        floating = jnp.issubdtype(w.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(w.shape, config.model.dtype if floating else w.dtype)

    start = merging.init_coefficients(loaded.config, merge)
    frozen = jax.tree.map(at_rest, loaded.params)
    loss = _loss(config, loaded.config, merge)
    return plan_step(config, settings, loss, start, frozen)


def describe_stage(
    config: ConfigDict, loaded: Loaded, settings: TrainConfig, merge: MergeConfig
) -> str:
    """Steps, FLOPs and memory of the merge stage in two lines."""
    shape = (config.train.batch_size, config.data.seq_len)
    memory = plan(config, loaded, settings, merge)
    start = merging.init_coefficients(loaded.config, merge)
    step_flops = _step_flops(config, loaded.config)
    return (
        f"steps    {settings.steps} of {shape[0]} x {shape[1]} tokens, {step_flops:.3g} FLOPs "
        f"each; {tree.num_params(start)} coefficients by {settings.optim.name}, lr "
        f"{settings.optim.lr:g}\n{describe_memory(memory)}"
    )


def save(loaded: Loaded, merged: Merged, merge: MergeConfig) -> None:
    """Writes the dense model with one more operation in its lineage."""
    params, record = merged
    args = {"mode": MODE.value} | dataclasses.asdict(merge)
    if MODE.value in ("shared_only", "grid"):
        args["lam"] = record.get("lam", 1.0)
    operations = lineage.append(
        loaded.lineage, "merge", [lineage.input_of(SOURCE.value)], args, record
    )
    dense = dataclasses.replace(
        loaded,
        params=jax.tree.map(np.asarray, params),
        config=merging.dense_config(loaded.config),
        lineage=operations,
    )
    save_any(dense, TARGET.value, FORMAT.value, overwrite=OVERWRITE.value)
    print(f"written  {TARGET.value} ({FORMAT.value})")


def _loss(config: ConfigDict, model: ModelConfig, merge: MergeConfig):
    dense_loss = functools.partial(
        lm_loss,
        options=forward_options(config),
        max_logit_bytes=config.compute.max_logit_mib * 2**20,
        z_weight=config.train.z_loss,
    )
    return merging.merge_loss(model, merge, dense_loss)


def _step_flops(config: ConfigDict, model: ModelConfig) -> float:
    tokens = config.train.batch_size * config.data.seq_len
    return flops.merge_flops(model, tokens, config.data.seq_len, 1)


def _heldout(rows: SharedData) -> Packed:
    if rows.heldout is None:
        raise InputError("this needs held-out data: raise data.heldout_share above 0")
    return rows.heldout


def _number(text: str) -> float:
    try:
        return MergeConfig(float(text)).lam
    except ValueError as error:
        raise InputError(f"--lams holds {text!r}: give numbers from 0 to 1") from error


if __name__ == "__main__":
    cli.run(main, freed="parts")
