"""`launch.wise --stage=sweep`: every delta and decoding sampled, graded, chosen, reported."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from launch import cli
from launch.mixing import check_relatives
from launch.wise_choice import Plan, Row, draw_plots, measure, say
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.evals import sandbox
from moejax.evals.draw import TaskSampler
from moejax.evals.run import require_grader
from moejax.evals.sweep import Criterion, Problem, Sweep
from moejax.evals.tasks import TASKS, Grading, load_items
from moejax.io import atomic
from moejax.io.load import Loaded, load_any
from moejax.report.table import as_csv
from moejax.serve.generate import GenerateConfig
from moejax.serve.sampling import SamplingConfig
from moejax.train.loop import claim_folder

TASK = flags.DEFINE_enum("task", "gsm8k", list(TASKS), "Sweep: what is asked.")
DATA = flags.DEFINE_string("data", None, "Sweep: the task's problems, a file or a hub data set.")
NUM = flags.DEFINE_integer("num", None, "Sweep: most problems read; default all.", lower_bound=4)
FORM = flags.DEFINE_string("form", None, "Sweep: prompt form; default the task's first.")
GRID = flags.DEFINE_list("delta_grid", ["0", "0.25", "0.5", "0.75", "1"],
                         "Sweep: deltas tried on validation problems, for every early checkpoint.")
POINTS = flags.DEFINE_integer("search_points", 0,
                              "Sweep: search that many deltas instead of the grid; 0: the grid.")
SAMPLINGS = flags.DEFINE_multi_string(
    "sampling", ["temperature=1"],
    "Sweep: a way to decode, as temperature=0.7,top_k=20,top_p=0.9,min_p=0.1; may be repeated: the "
    "first is the interpolations', the others are tried on the late model.")
CRITERION = flags.DEFINE_string("criterion", "pass@8", "Sweep: what is chosen by: pass@K, maj@K.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 16, "Sweep: of each problem.", lower_bound=2)
K = flags.DEFINE_list("k", ["1", "2", "4", "8", "16"], "Sweep: reported for these.")
SHARE = flags.DEFINE_float("validation_share", 0.4, "Sweep: problems to choose on.", 0.05, 0.95)
NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Sweep: per answer.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch_size", 64, "Sweep: rows decoded at a time.", lower_bound=1)
SCORE = flags.DEFINE_bool("score_samples", True, "Sweep: Best@k by mean log-probability.")
EXECUTE = flags.DEFINE_bool("allow_code_execution", False,
                            "Sweep: run the programs that the model writes, in the sandbox.")


def sweep_stage(early: Sequence[str], late: str, out: str, seed: int) -> None:
    """Runs the sweep and writes OUT: samples/, table.csv, sweep.json, plots/."""
    began = time.perf_counter()
    plan = _plan(early, late, seed)
    task = TASKS[TASK.value]
    check_models([*plan.early, plan.late], False)
    items = load_items(task, DATA.value, NUM.value)
    validation, test = _split(len(items), seed)
    arms = len(plan.early) * (plan.points or len(plan.grid))
    print(
        f"sweep    {task.name}: {len(validation)} problems to choose on, {len(test)} to report on, "
        f"{plan.num_samples} samples each; {arms} interpolations of {len(plan.early)} early "
        f"checkpoints, {len(plan.samplings)} decodings",
        flush=True,
    )
    if cli.DRY_RUN.value:
        print("dry run: nothing written")
        return
    folder = Path(out)
    loaders = {name: functools.partial(params_of, name) for name in plan.early}
    identity = dataclasses.asdict(plan) | {"validation_share": SHARE.value}
    claimed = (folder, identity, "sweep_config.json")
    run, problems = begin(plan.late, loaders, items, claimed, plan.num_samples, seed)
    splits = {"validation": [problems[i] for i in validation], "test": [problems[i] for i in test]}
    result, rows, sampled = measure(run, plan, splits)
    result["wall_s"] = round(time.perf_counter() - began, 1)
    atomic.write_text(folder / "table.csv", as_csv(rows))
    atomic.write_json(folder / "sweep.json", result)
    draw_plots(plan, result, rows, sampled, folder / "plots")
    say(result, plan)
    print(f"written  {folder}/sweep.json, table.csv, plots/ in {result['wall_s']:.0f} s")


# -- what was asked --------------------------------------------------------------------------------


def _plan(early: Sequence[str], late: str, seed: int) -> Plan:
    criterion = Criterion.parse(CRITERION.value)
    try:
        grid = tuple(sorted({float(text) for text in GRID.value}))
        ks = tuple(sorted({int(text) for text in K.value}))
    except ValueError as error:
        raise InputError(f"--delta_grid and --k take numbers: {error}") from None
    if not grid or not 0 <= grid[0] <= grid[-1] <= 1:
        raise InputError(f"--delta_grid={','.join(GRID.value)} must lie in [0, 1]")
    if not ks or ks[0] < 1:
        raise InputError(f"--k={','.join(K.value)} must be positive whole numbers")
    check_ks({"--k": ks[-1], "--criterion": criterion.k})
    if POINTS.value and POINTS.value < 3:
        raise InputError(f"--search_points={POINTS.value}: a search needs at least 3")
    samplings = tuple(sampling_of(text) for text in SAMPLINGS.value)
    return Plan(tuple(early), late, samplings, grid, POINTS.value, criterion, ks,
                NUM_SAMPLES.value, seed)


def check_ks(asked: dict[str, int]) -> None:
    """InputError for a flag that asks for more samples than are drawn."""
    for name, k in asked.items():
        if k > NUM_SAMPLES.value:
            raise InputError(f"{name} asks for k={k}, but --num_samples={NUM_SAMPLES.value}")


def check_models(names: Sequence[str], allow_unrelated: bool) -> None:
    """InputError unless models are there and of one run; says what cannot be told."""
    models = [load_any(name, abstract=True) for name in names]
    for note in check_relatives(models, names, allow_unrelated):
        print(f"note     {note}")


def sampling_of(text: str) -> SamplingConfig:
    """What --sampling says; InputError for what it cannot mean."""
    fields: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        kinds = {"temperature": float, "top_k": int, "top_p": float, "min_p": float}
        if not equals or name not in kinds:
            raise InputError(f"--sampling={text}: {part!r} is none of {', '.join(kinds)}=NUMBER")
        try:
            fields[name] = kinds[name](value)
        except ValueError:
            raise InputError(f"--sampling={text}: {value!r} is not a number") from None
    sampling = SamplingConfig(**{"temperature": 1.0} | fields)
    if sampling.temperature == 0:
        raise InputError(f"--sampling={text}: greedy decoding has one answer, a sweep needs many")
    return sampling


def _split(number: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the problems to choose on and to report on."""
    order = np.random.default_rng([seed, 11]).permutation(number)
    cut = round(number * SHARE.value)
    if not 2 <= cut <= number - 2:
        raise InputError(f"{number} problems cannot be split by --validation_share={SHARE.value}")
    return sorted(order[:cut].tolist()), sorted(order[cut:].tolist())


def begin(
    late: str,
    early: Mapping[str, Callable[[], tree.Tree]],
    items: Sequence[Any],
    claimed: tuple[Path, Row, str],
    num_samples: int,
    seed: int,
) -> tuple[Sweep, list[Problem]]:
    """Claims a folder (its path, what it is of, the file that says so); loads a sweep's late model.

    Returns the sweep, which draws to the folder's samples/, and the items as its problems.
    """
    if TASKS[TASK.value].executes:
        sandbox.require_permission(EXECUTE.value)
        require_grader(TASKS[TASK.value])
    folder, identity, file = claimed
    identity = identity | {"task": TASK.value, "data": DATA.value, "form": FORM.value}
    identity |= {"num_problems": len(items), "max_new_tokens": NEW_TOKENS.value}
    claim_folder(folder, identity | {"score": SCORE.value}, file)
    model = load_any(late, "float32")
    sampler = _sampler(model)
    run = Sweep(
        jax.device_put(model.params),
        early,
        sampler,
        num_samples,
        folder / "samples",
        seed=seed,
        progress=lambda line: print(f"draw     {line}", flush=True),
    )
    return run, sampler.problems(items)


def _sampler(model: Loaded) -> TaskSampler:
    if model.tokenizer is None:
        raise InputError(f"{model.source} has no tokenizer, so it cannot be asked anything")
    task = TASKS[TASK.value]
    drawing = GenerateConfig(
        NEW_TOKENS.value, stop_ids=tuple(model.tokenizer.eos_ids), batch_size=BATCH.value
    )
    grading = Grading(allow_code_execution=EXECUTE.value)
    form = task.form(FORM.value)
    return TaskSampler(model.config, model.tokenizer, task, form, drawing, grading, SCORE.value)


def params_of(name: str) -> tree.Tree:
    """A model's parameters in float32, on the device."""
    return jax.device_put(load_any(name, "float32").params)
