"""What `launch.rl` does once its flags are read; no flags here, so that a test can use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from moejax.core.errors import InputError
from moejax.evals.draw import TaskSampler
from moejax.evals.sweep import Problem
from moejax.evals.tasks import TASKS, Grading
from moejax.io import lineage
from moejax.io.hf import has_class
from moejax.io.load import Loaded, load_any, save_any
from moejax.models.transformer import ForwardOptions
from moejax.report import rl_plots
from moejax.serve.generate import GenerateConfig, prepare
from moejax.serve.sampling import SamplingConfig
from moejax.train.grpo import GrpoConfig, make_grpo_loss
from moejax.train.loop import RunInfo, TrainConfig, fit
from moejax.train.optim import OptimConfig
from moejax.train.rl import Judged, OnPolicy, RlConfig


def train(
    config: ConfigDict,
    sampler: TaskSampler,
    problems: Sequence[Problem],
    settings: tuple[RlConfig, GrpoConfig, TrainConfig],
    workdir: Path,
) -> None:
    """Runs the iterations and writes WORKDIR/model and curves.png."""
    rl, grpo, run = settings
    split = len(problems) - config.data.heldout
    asked, heldout = problems[:split], problems[split:]
    loaded = load_any(config.model.source, config.model.dtype)
    start = jax.device_put(loaded.params)
    options = ForwardOptions(config.compute.dtype, config.compute.remat)

    def describe(number: int, ids: Sequence[int]) -> dict[str, str]:
        return {"id": asked[number].id, "completion": sampler.tokenizer.decode(ids)}

    batches = OnPolicy(
        sampler.model,
        rl,
        grpo,
        [problem.prompt for problem in asked],
        Judged(make_rollout(sampler), make_reward(sampler, asked), describe),
        workdir / "rollouts",
        reference=start if grpo.kl_weight else None,
        options=options,
    )
    identity = {"config": {name: config[name].to_dict() for name in ("model", "data", "rl")}}
    result = fit(
        run,
        make_grpo_loss(sampler.model, grpo, options),
        start,
        {},
        batches,
        workdir,
        make_eval(sampler, heldout, rl.seed),
        RunInfo("rl", identity, on_policy=True),
    )
    rl_plots.curves(result.records).savefig(workdir / "curves.png", dpi=130)
    save(config, loaded, result.params, result.records, workdir / "model")


def rl_config(config: ConfigDict) -> RlConfig:
    """How much is drawn."""
    r = config.rl
    if r.iterations < 1:
        raise InputError(f"rl.iterations must be 1 or more, got {r.iterations}")
    return RlConfig(r.prompts, r.answers, r.epochs, r.minibatches, r.max_answer, r.seed)


def grpo_config(config: ConfigDict) -> GrpoConfig:
    """The objective."""
    r = config.rl
    return GrpoConfig(r.clip_low, r.clip_high, r.kl_weight, r.scale, r.mean)


def train_config(config: ConfigDict, rl: RlConfig) -> TrainConfig:
    """The run's settings, in updates: checkpoints and evaluations fall between iterations."""
    t = config.train
    return TrainConfig(
        config.rl.iterations * rl.updates,
        OptimConfig(t.optimizer, t.lr, "constant", clip_norm=t.clip_norm),
        accumulation=t.accumulation,
        seed=rl.seed,
        log_every=t.log_every,
        save_every=t.save_every * rl.updates,
        eval_every=t.eval_every * rl.updates,
        keep_last=t.keep_last,
    )


def make_sampler(config: ConfigDict, loaded: Loaded, execute: bool) -> TaskSampler:
    """Asks and grades with the model's own tokenizer and prompt form."""
    if loaded.tokenizer is None:
        raise InputError(f"{config.model.source} has no tokenizer, so it cannot be asked anything")
    task = TASKS[config.data.task]
    drawing = GenerateConfig(
        config.rl.max_answer,
        stop_ids=tuple(loaded.tokenizer.eos_ids),
        batch_size=config.compute.batch_size,
        options=ForwardOptions(config.compute.dtype),
    )
    form = task.form(config.data.form or None)
    grading = Grading(allow_code_execution=execute)
    return TaskSampler(loaded.config, loaded.tokenizer, task, form, drawing, grading)


def make_rollout(sampler: TaskSampler):
    """Answers at temperature 1; the end token, part of what is learned, is put back."""
    end = sampler.drawing.stop_ids[0] if sampler.drawing.stop_ids else None

    def rollout(params, prompts, seed):
        ready = prepare(params, sampler.drawing.options.compute_dtype)
        found = sampler.complete(ready, prompts, SamplingConfig(1.0), seed)
        return [c.ids + ([end] if c.finished and end is not None else []) for c in found]

    return rollout


def make_reward(sampler: TaskSampler, problems: Sequence[Problem]):
    """1 for an answer that the task's grader passes without a doubt, else 0."""

    def reward(numbers, answers):
        graded = sampler.grade([problems[n] for n in numbers], answers)
        return [float(grade.passed and not grade.weak) for _, _, grade in graded]

    return reward


def make_eval(sampler: TaskSampler, heldout: Sequence[Problem], seed: int):
    """Share of held-out problems solved greedily; None where nothing is held out."""
    if not heldout:
        return None

    def evaluate(params, frozen) -> dict[str, float]:
        del frozen
        answers = sampler(params, heldout, 1, SamplingConfig(0.0), seed)
        return {"solved": float(np.mean([row[0].correct for row in answers]))}

    return evaluate


def save(config: ConfigDict, loaded: Loaded, params: Any, records, target: Path) -> None:
    """Writes the policy, replacing one that an earlier start of this run wrote."""
    read = [lineage.input_of(loaded.source)]
    results = {"last_reward": [r["reward"] for r in records if "reward" in r][-1]}
    operations = lineage.append(loaded.lineage, "rl", read, config.to_dict(), results)
    params = jax.tree.map(np.asarray, params)
    tuned = dataclasses.replace(loaded, params=params, lineage=operations)
    form = "hf" if has_class(loaded.config) else "orbax"
    save_any(tuned, target, form, overwrite=True)
    print(f"written  {target} ({form})")
