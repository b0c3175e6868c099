"""Supervised fine-tuning of a model, dense or a mixture of experts, on conversations.

    python -m launch.train --config=configs/quickstart_sft.py --config.model.source=MODEL \\
        --workdir=runs/sft
    python -m launch.train --config=configs/quickstart_sft.py --config.train.lr=1e-5 --dry_run
    python -m launch.train --multihost=HOST:PORT,NUM,INDEX --config=... --workdir=SHARED_FOLDER

--config.SECTION.KEY=VALUE changes a key; configs/base.py says what each means. All devices are
used, split as --config.mesh.* says (0 chooses). A run whose --workdir is there goes on where it
stopped, also on another mesh or number of processes; the tuned model is WORKDIR/model.
SIGTERM saves and exits with 75: start the same command again. --export_step=N makes a model of
one checkpoint, as for launch.wise (--config.train.keep_every keeps a trajectory of them).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from launch import cli, multihost, out_of_memory
from launch.planning import describe_exchange, explainer, setup_of, this_chip
from launch.program import grad_dtype, make_loss, make_mesh_of, parallel_options
from launch.settings import (
    BEFORE,
    PRESET,
    check_heldout,
    checked,
    describe,
    describe_memory,
    heldout_nll,
    load_rows,
    plan_memory,
    preset,
    split_frozen,
    step_flops_of,
    train_config,
    with_dtype,
)
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.data.loader import batches
from moejax.data.packing import Packed
from moejax.data.shared import SharedData
from moejax.io import lineage, processes
from moejax.io.hf import has_class
from moejax.io.load import Loaded, load_any, save_any
from moejax.io.sharded import on_mesh
from moejax.models.config import ModelConfig
from moejax.train.folder import check_shared
from moejax.train.layout import describe_mesh
from moejax.train.loop import FitResult, RunInfo, TrainConfig, fit, load_best, load_params
from moejax.train.peak import measure_gemm_peak
from moejax.train.placement import place_params
from moejax.train.selection_bias import selection_bias_update

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, or one like them.")
EXPORT_STEP = flags.DEFINE_integer(
    "export_step", None, "Train nothing: write WORKDIR/model_step_N from the checkpoint of step N."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; resumed if it is there.")


def main(argv) -> None:
    del argv
    config = checked(CONFIG.value)
    multihost.start()
    say = multihost.say
    if config.model.source.startswith(PRESET):
        plan_preset(config)
        return
    workdir = WORKDIR.value
    if workdir is None and not cli.DRY_RUN.value:
        raise InputError("--workdir is missing: name the folder that the run is kept in")
    if not config.model.source:
        raise InputError("--config.model.source is missing: a model folder, .gguf file or hub id")
    plan = load_any(config.model.source, config.model.dtype, abstract=True)
    config = with_dtype(config, plan.params)
    out_of_memory.explain_with(explainer(config, plan.config))
    rows = load_rows(config, plan)
    settings = train_config(config, len(rows.train))
    check_heldout(settings, rows)
    mesh = make_mesh_of(config, plan.config)
    loss = make_loss(plan.config, config)
    for line in [*multihost.device_table(), *describe(config, plan.config, settings, rows)]:
        say(line)
    say(f"mesh     {describe_mesh(mesh)}, {jax.process_count()} process(es)")
    if how := describe_exchange(setup_of(config, plan.config, mesh.shape, this_chip())):
        say(f"experts  {how}")
    say(describe_memory(plan_memory(config, plan.config, settings, loss)))
    if workdir is None or cli.DRY_RUN.value:
        say("dry run: nothing trained, nothing written")
        return
    check_shared(workdir)
    if EXPORT_STEP.value is not None:
        export(config, plan, mesh, Path(workdir))
        return
    train(config, load_on(mesh, config), rows, settings, (mesh, Path(workdir)))


def export(config: ConfigDict, plan: Loaded, mesh: Mesh, workdir: Path) -> None:
    """Writes the weights of one checkpoint as a model, without the optimizer's state."""
    step = EXPORT_STEP.value
    assert step is not None
    if not (workdir / "ckpt").is_dir():
        raise InputError(f"{workdir} holds no checkpoints: name the --workdir of a run")
    trained, frozen = split_frozen(config, place_params(plan.params, mesh))
    params = load_params(workdir, trained, step)
    if frozen:
        params = tree.join(params, split_frozen(config, load_on(mesh, config).params)[1])
    result = FitResult(params, step, None, None, [{"step": step}])
    loaded = dataclasses.replace(plan, params=params, tensors=None)
    save(config, loaded, result, {}, workdir / f"model_step_{step}")


def load_on(mesh: Mesh, config: ConfigDict) -> Loaded:
    """The model on the devices; of several, each process reads only what its devices hold."""
    source, dtype = config.model.source, config.model.dtype
    if mesh.size > 1:
        return load_any(source, dtype, place=on_mesh(mesh))
    loaded = load_any(source, dtype)
    # From here on the device's copy is the only one, and the run takes it over.
    return dataclasses.replace(loaded, params=jax.device_put(loaded.params))


def train(
    config: ConfigDict,
    loaded: Loaded,
    rows: SharedData,
    settings: TrainConfig,
    where: tuple[Mesh, Path],
) -> None:
    """Runs the stage and writes WORKDIR/model."""
    mesh, workdir = where
    model, data = loaded.config, config.data
    trained, frozen = split_frozen(config, loaded.params)
    loaded = dataclasses.replace(loaded, params=None)
    sections = ("model", "data", "compute")
    identity = {
        "config": {name: config[name].to_dict() for name in sections},
        "batch_size": config.train.batch_size,
        "data": rows.summary,
    }
    peak = measure_gemm_peak(config.compute.dtype)
    rate = f"{peak.gflops:,.0f} GFLOP/s in {peak.dtype} matrix products"
    multihost.say(f"machine  {rate}, {peak.device}")
    settings = dataclasses.replace(settings, grad_dtype=grad_dtype(config))
    result = fit(
        settings,
        make_loss(model, config, mesh),
        trained,
        frozen,
        batches(rows.train, config.train.batch_size, data.seed),
        workdir,
        make_eval(config, model, rows.heldout, mesh),
        RunInfo(
            "train",
            identity,
            step_flops_of(config, model),
            peak,
            donate=True,
            mesh=mesh if mesh.size > 1 else None,
            before=BEFORE,
        ),
        selection_bias_update(model),
    )
    best = settings.best_metric and result.best_step != result.step
    tuned = load_best(workdir, result.params) if best else result.params
    tuned_model = dataclasses.replace(loaded, params=tree.join(tuned, frozen))
    save(config, tuned_model, result, rows.summary, workdir / "model")


def make_eval(config: ConfigDict, model: ModelConfig, heldout: Packed | None, mesh: Mesh):
    """Held-out nats per answer token, or nothing where nothing is held out."""
    if heldout is None:
        return None
    options = parallel_options(config, mesh)

    def evaluate(params, frozen):
        params = tree.join(params, frozen)
        return {"nll": heldout_nll(config, params, model, heldout, options)}

    return evaluate


def save(config: ConfigDict, loaded: Loaded, result: FitResult, data: dict, target: Path) -> None:
    """Writes the tuned model, replacing one that an earlier start of this run wrote."""
    loaded, problem = dataclasses.replace(loaded, params=processes.to_host(loaded.params)), ""
    if processes.is_first():
        try:
            write(config, loaded, result, data, target)
        except InputError as error:
            problem = str(error)
    processes.agree(problem)


def write(config: ConfigDict, loaded: Loaded, result: FitResult, data: dict, target: Path) -> None:
    """`save` of parameters on the host, by one process."""
    results: dict[str, Any] = {"step": result.step, "last_loss": result.last_loss}
    results |= {"train_tokens": result.train_tokens, "wall_s": round(result.wall_s, 1)}
    results["data"] = data
    if result.best_step is not None:
        results |= {"best_step": result.best_step, "best_nll": result.best_value}
    read = [lineage.input_of(loaded.source)]
    operations = lineage.append(loaded.lineage, "train", read, config.to_dict(), results)
    loaded = dataclasses.replace(loaded, lineage=operations)
    form = config.save.format or ("hf" if has_class(loaded.config) else "orbax")
    save_any(loaded, target, form, config.save.dtype, overwrite=True)
    print(f"written  {target} ({form}) after {result.wall_s:.0f} s of training")


def plan_preset(config: ConfigDict) -> None:
    """A dry run on the sizes of a named model, without its weights or data."""
    model, config = preset(config), with_dtype(config, None)
    if not cli.DRY_RUN.value:
        raise InputError(f"{config.model.source} has sizes but no weights: add --dry_run")
    settings = train_config(config, None)
    for line in describe(config, model, settings, None):
        print(line)
    print(f"mesh     {describe_mesh(make_mesh_of(config, model))}")
    print(describe_memory(plan_memory(config, model, settings, make_loss(model, config))))
    print("dry run: nothing trained, nothing written")


if __name__ == "__main__":
    cli.run(main)
