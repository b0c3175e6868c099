"""Reinforcement learning on verifiable rewards, by GRPO (moejax/train/grpo.py).

    python -m launch.rl --config=configs/rl_gsm8k.py --config.model.source=runs/wise \\
        --config.data.path=problems.jsonl --workdir=runs/rl [--allow_code_execution]

Each iteration asks the model some problems of a task several times, rewards 1 for an answer that
the task's grader passes and 0 for any other, and takes a few steps. Answers are drawn at
temperature 1, uncut: what is drawn from is what is differentiated. Programs run in the sandbox,
tests apart from the candidate; tasks whose tests cannot be kept apart are refused.
configs/rl_gsm8k.py says what each key means. WORKDIR gets metrics.jsonl and tb/, rollouts/ (every
answer with its reward), curves.png and, at the end, model/. Stopped and started again, also in the
middle of an iteration, it goes on where it was.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from configs import rl_gsm8k
from launch import cli
from launch.rl_run import grpo_config, make_sampler, rl_config, train, train_config
from launch.settings import checked
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.evals import sandbox
from moejax.evals.run import require_grader
from moejax.evals.tasks import TASKS, load_items
from moejax.io.load import load_any

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/rl_gsm8k.py, or one like it.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; resumed if it is there.")
EXECUTE = flags.DEFINE_bool(
    "allow_code_execution", False, "Run the programs that the model writes, in the sandbox."
)


def main(argv) -> None:
    del argv
    config = checked(CONFIG.value, rl_gsm8k.get_config())
    if not config.model.source:
        raise InputError("--config.model.source is missing: a model folder, .gguf file or hub id")
    if config.data.task not in TASKS:
        raise InputError(f"data.task {config.data.task!r} is unknown: use {', '.join(TASKS)}")
    task = TASKS[config.data.task]
    settings, grpo = rl_config(config), grpo_config(config)
    run = train_config(config, settings)
    items = load_items(task, config.data.path or None, config.data.limit or None)
    loaded = load_any(config.model.source, config.model.dtype, abstract=True)
    sampler = make_sampler(config, loaded, EXECUTE.value)
    problems = sampler.problems(items, strict=True)
    held = config.data.heldout
    if not 0 <= held <= len(problems) - settings.prompts:
        raise InputError(
            f"data.heldout={held} of {len(problems)} problems leaves fewer than the "
            f"{settings.prompts} of an iteration"
        )
    print(
        f"model    {config.model.source}: {tree.num_params(loaded.params):,} parameters\n"
        f"task     {task.name}, form {sampler.form}: {len(problems) - held} problems, {held} held "
        f"out\nsteps    {config.rl.iterations} iterations of {settings.prompts} x "
        f"{settings.answers} answers of up to {settings.max_answer} tokens, {settings.updates} "
        f"updates each; KL weight {grpo.kl_weight:g}",
        flush=True,
    )
    if cli.DRY_RUN.value:
        print("dry run: nothing trained, nothing written")
        return
    if WORKDIR.value is None:
        raise InputError("--workdir is missing: name the folder that the run is kept in")
    if task.executes:
        sandbox.require_permission(EXECUTE.value)
        require_grader(task)
    train(config, sampler, problems, (settings, grpo, run), Path(WORKDIR.value))


if __name__ == "__main__":
    cli.run(main)
