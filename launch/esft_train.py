"""launch.esft --stage=train: a model, a task and a method -> a delta, or a tuned model."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs.esft import base as esft_base
from launch import multihost, out_of_memory
from launch.esft_score import bar
from launch.multihost import say
from launch.program import make_mesh_of, parallel_options
from launch.settings import (
    BEFORE,
    check_heldout,
    check_update_patterns,
    checked,
    describe,
    describe_memory,
    heldout_nll,
    load_rows,
    train_config,
)
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.data.loader import batches, fixed_batches
from moejax.data.packing import Packed
from moejax.data.shared import SharedData
from moejax.io import atomic, lineage, processes
from moejax.io.hf import has_class
from moejax.io.load import Loaded, load_any, save_any
from moejax.io.sharded import on_mesh, spread
from moejax.methods import adapter_files, esft_delta, expert_config, expert_scores, score_files
from moejax.methods import expert_selection as selection
from moejax.methods.adaptation import METHODS, Adaptation, adapt
from moejax.methods.expert_config import ExpertConfig
from moejax.methods.lora import LoraConfig
from moejax.methods.routing_ledger import routing_ledger
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions
from moejax.train.folder import check_shared
from moejax.train.layout import describe_mesh
from moejax.train.loop import FitResult, RunInfo, TrainConfig, fit, load_best
from moejax.train.loss import lm_loss
from moejax.train.memory import step_memory
from moejax.train.optim import make_optimizer


def main(flags: dict[str, Any]) -> None:
    """Runs one arm and writes WORKDIR/delta or WORKDIR/model, result.json and routing.json."""
    config = checked(flags["config"], esft_base.get_config())
    multihost.start()
    workdir = Path(flags["workdir"])
    check_method(config)
    method = config.method.name
    if not config.model.source:
        raise InputError("--config.model.source is missing: a model folder, .gguf file or hub id")
    plan = load_any(config.model.source, config.model.dtype, abstract=True)
    if plan.config.moe is None:
        raise InputError(f"{config.model.source} is dense: ESFT adapts experts, upcycle it first")
    chosen = None
    if method == "esft" and config.method.experts:
        chosen = expert_config.read(config.method.experts)
        chosen.check_fits(plan.config, config.method.experts)
    selection.check_threshold(config.method.threshold)
    rows = load_rows(config, plan)
    settings = train_config(config, len(rows.train))
    check_heldout(settings, rows)
    mesh = make_mesh_of(config, plan.config)
    for line in [*multihost.device_table(), *describe(config, plan.config, settings, rows)]:
        say(line)
    say(f"mesh     {describe_mesh(mesh)}, {jax.process_count()} process(es)")
    if flags["dry_run"]:
        if method != "esft" or chosen is not None:
            say(describe_memory(plan_memory(config, plan, settings, chosen)))
        say("dry run: nothing trained, nothing written")
        return
    check_shared(workdir)
    # Every process keeps a copy on its host: what is trained is cut out of it, and put back.
    loaded = load_any(config.model.source, config.model.dtype)
    if method == "esft" and chosen is None:
        chosen = warm_up(config, loaded, rows, (mesh, workdir))
    run(config, loaded, rows, settings, (chosen, mesh, workdir))


def check_method(config: ConfigDict) -> None:
    """InputError for a method that there is not, and for train.freeze beside one."""
    if config.method.name not in METHODS:
        raise InputError(
            f"method.name {config.method.name!r} is unknown: use one of {', '.join(METHODS)}"
        )
    if config.train.freeze:
        raise InputError(
            f"train.freeze {config.train.freeze!r} is not read here: method.name and "
            "method.experts say what is trained, leave it empty"
        )


def _explainer(config: ConfigDict, model: ModelConfig, share: float):
    from launch.planning import explainer  # which plans this module's step

    return explainer(config, model, share)


def run(
    config: ConfigDict,
    loaded: Loaded,
    rows: SharedData,
    settings: TrainConfig,
    where: tuple[ExpertConfig | None, Mesh, Path],
) -> None:
    """Trains one arm and writes what came of it."""
    chosen, mesh, workdir = where
    model = training_model(config, loaded.config)
    adaptation = make_adaptation(config, loaded.params, model, chosen)
    adaptation = dataclasses.replace(
        adaptation,
        trainable=placed(adaptation.trainable, mesh),
        frozen=placed(adaptation.frozen, mesh),
    )
    say(describe_arm(config, adaptation, loaded, chosen))
    share = tree.num_params(adaptation.trainable) / tree.num_params(loaded.params)
    out_of_memory.explain_with(_explainer(config, loaded.config, share))
    options, assemble = parallel_options(config, mesh), jax.jit(adaptation.assemble)
    evaluate = make_eval(config, model, assemble, rows, options)
    before = evaluate(adaptation.trainable, adaptation.frozen) if evaluate else {}
    if config.method.name == "frozen":
        _write_first(workdir / "result.json", {"before": before, "after": before})
        say(f"frozen   {before}")
        return
    identity = {
        "config": {n: config[n].to_dict() for n in ("model", "data", "compute", "method")},
        "batch_size": config.train.batch_size,
        "data": rows.summary,
        "experts": chosen.to_json() if chosen else None,
    }
    result = fit(
        settings,
        make_loss(config, model, adaptation, options),
        adaptation.trainable,
        adaptation.frozen,
        batches(rows.train, config.train.batch_size, config.data.seed),
        workdir,
        evaluate,
        RunInfo(
            f"esft {config.method.name}",
            identity,
            mesh=mesh if mesh.size > 1 else None,
            before=BEFORE,
        ),
    )
    trained = result.params
    if settings.best_metric and result.best_step != result.step:
        trained = load_best(workdir, result.params)
    after = evaluate(trained, adaptation.frozen) if evaluate else {}
    figures = {"before": before, "after": after, "wall_s": result.wall_s}
    figures |= {"train_tokens": result.train_tokens, "best_step": result.best_step}
    figures["trained_params"] = tree.num_params(trained)
    if rows.heldout is not None:
        sides = [assemble(part, adaptation.frozen) for part in (adaptation.trainable, trained)]
        ledger = _ledger(config, sides, loaded.config, rows.heldout, options)
        _write_first(workdir / "routing.json", ledger)
        mean = ledger["mean"]
        say(
            f"routing  {mean['overlap']:.1%} of experts kept per token, KL of the load "
            f"{mean['kl']:.2e}, on {ledger['num_tokens']:,} held-out tokens"
        )
        say(f"heldout  nll {before['nll']:.4f} before, {after['nll']:.4f} after")
    trained, problem = processes.to_host(trained), ""
    if processes.is_first():
        try:
            tuned = adaptation.finish(trained, loaded.params)
            _save(config, loaded, tuned, (trained, chosen), result, workdir)
            atomic.write_json(workdir / "result.json", figures)
        except InputError as error:
            problem = str(error)
    processes.agree(problem)


def placed(params: tree.Tree, mesh: Mesh) -> tree.Tree:
    """Host arrays on the device, or on a mesh by the rules of `moejax.core.sharding`."""
    return spread(params, on_mesh(mesh)) if mesh.size > 1 else jax.device_put(params)


def training_model(config: ConfigDict, model: ModelConfig) -> ModelConfig:
    """The model with or without its router's losses; routing itself stays as it is."""
    if config.method.balance_loss or model.moe is None:
        return model
    moe = dataclasses.replace(model.moe, balance="none", balance_weight=0.0, z_weight=0.0)
    return dataclasses.replace(model, moe=moe)


def make_adaptation(config: ConfigDict, params, model, chosen) -> Adaptation:
    """The config's method; patterns of parameters have to fit what it trains."""
    settings = config.method
    low_rank = LoraConfig(
        settings.lora_rank, settings.lora_alpha, tuple(settings.lora_targets), config.train.seed
    )
    made = adapt(settings.name, params, model, chosen=chosen, low_rank=low_rank)
    if made.trainable:
        check_update_patterns(config, made.trainable)
    return made


def make_loss(config: ConfigDict, model: ModelConfig, adaptation: Adaptation, options):
    """The loss of the trained part; routers are perturbed only if method.router_noise says so."""
    noisy, z_weight = config.method.router_noise, config.train.z_loss
    memory = config.compute.max_logit_mib * 2**20

    def loss(trainable, frozen, batch, rng):
        params = adaptation.assemble(trainable, frozen)
        rng = rng if noisy else None
        return lm_loss(params, model, batch, rng, options, memory, z_weight)

    return loss


def make_eval(
    config: ConfigDict, model: ModelConfig, assemble: Any, rows: SharedData, options: ForwardOptions
):
    """Held-out nats per answer token, or None where nothing is held out."""
    heldout = rows.heldout
    if heldout is None:
        return None

    def evaluate(trainable, frozen):
        params = assemble(trainable, frozen)
        return {"nll": heldout_nll(config, params, model, heldout, options)}

    return evaluate


def warm_up(
    config: ConfigDict, loaded: Loaded, rows: SharedData, where: tuple[Mesh, Path]
) -> ExpertConfig:
    """Scores the first training rows and selects; a run that goes on reads what it chose."""
    mesh, workdir = where
    path = workdir / "experts.json"
    if processes.from_first(path.exists()):
        return expert_config.read(path)
    settings, batch_size = config.method, config.train.batch_size // config.train.accumulation
    train = rows.train.packed()
    sizes = np.cumsum((train.segment_ids > 0).sum(axis=1))
    wanted = settings.num_tokens or int(sizes[-1])
    num_rows = min(len(sizes), int(np.searchsorted(sizes, wanted)) + 1)
    num_batches = -(-num_rows // batch_size)
    first_rows = itertools.islice(fixed_batches(train, batch_size), num_batches)
    with bar("scoring", num_batches) as advance:
        counted = expert_scores.count(
            placed(loaded.params, mesh),
            loaded.config,
            first_rows,
            num_segments=max(map(len, train.ids)),
            options=parallel_options(config, mesh),
            on_tokens=lambda number, trace, ids: advance(number + 1),
        )
    scores = counted.scores().rounded(4)
    chosen = selection.select_by_threshold(scores, settings.score, settings.threshold)
    switches = {n: settings[n] for n in ("shared_experts", "non_expert_modules")}
    chosen = dataclasses.replace(chosen, **switches)
    _write_first(workdir / score_files.SUMMARY, score_files.summary_json(scores))
    if processes.is_first():
        expert_config.write(path, chosen)
    processes.agree()
    say(f"scored   {int(counted.pooled.tokens):,} tokens; {len(chosen.pairs)} experts in {path}")
    return chosen


def plan_memory(config: ConfigDict, plan: Loaded, settings: TrainConfig, chosen):
    """Memory of a step, from shapes alone."""
    model = training_model(config, plan.config)
    shape = (config.train.batch_size, config.data.seq_len)
    names = ("tokens", "segment_ids", "positions", "loss_mask")
    batch = {name: jax.ShapeDtypeStruct(shape, np.int32) for name in names}

    def parts(params):
        made = make_adaptation(config, params, model, chosen)
        return made.trainable, made.frozen

    trainable, frozen = jax.eval_shape(parts, plan.params)
    made = Adaptation({}, {}, *_faces(config, plan, model, chosen))
    loss = make_loss(config, model, made, parallel_options(config, None))
    optimizer = make_optimizer(settings.optim, settings.steps)
    cut = settings.accumulation, settings.accumulation_dtype
    return step_memory(loss, optimizer, trainable, frozen, batch, *cut)


def describe_arm(config: ConfigDict, adaptation: Adaptation, loaded: Loaded, chosen) -> str:
    """One line: what is trained, and the bytes of its state."""
    trained, whole = tree.num_params(adaptation.trainable), tree.num_params(loaded.params)
    experts = f", {len(chosen.pairs)} experts" if chosen else ""
    return (
        f"arm      {config.method.name}{experts}: {trained:,} of {whole:,} parameters trained "
        f"({trained / whole:.2%}), master and two moments {12 * trained / 1e6:,.1f} MB"
    )


def _faces(config, plan: Loaded, model, chosen):
    """assemble and finish of an arm whose parameters are not there."""
    found: list[Any] = []

    def look(params):
        made = make_adaptation(config, params, model, chosen)
        found.extend((made.assemble, made.finish))
        return 0

    jax.eval_shape(look, plan.params)
    return found


def _save(config, loaded: Loaded, tuned, trained, result: FitResult, workdir: Path) -> None:
    """The delta of ESFT; the whole model of the other methods, and of ESFT if asked for."""
    params, chosen = trained
    about = {"step": result.step, "train_tokens": result.train_tokens}
    read = [lineage.input_of(loaded.source)]
    operations = lineage.append(loaded.lineage, "esft_train", read, config.to_dict(), about)
    if chosen is not None:
        delta = esft_delta.of_trained(params, loaded.params, loaded.config, chosen)
        adapter_files.write(workdir / "delta", delta, loaded.config, operations, overwrite=True)
        print(f"written  {workdir / 'delta'}: {delta.num_bytes / 1e6:,.1f} MB")
    if chosen is None or config.method.whole_model:
        form = config.save.format or ("hf" if has_class(loaded.config) else "orbax")
        whole = dataclasses.replace(loaded, params=tuned, lineage=operations)
        save_any(whole, workdir / "model", form, config.save.dtype, overwrite=True)
        print(f"written  {workdir / 'model'} ({form})")


def _ledger(config, sides, model: ModelConfig, heldout: Packed, options) -> dict[str, Any]:
    parts = fixed_batches(heldout, config.train.batch_size // config.train.accumulation)
    before, after = sides
    return routing_ledger(before, after, model, parts, options=options)


def _write_first(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON into the run's folder, by one process."""
    if processes.is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(path, content)
