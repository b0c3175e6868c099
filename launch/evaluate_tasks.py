"""Tasks whose answers are generated, or read from a file, and judged one by one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from launch.evaluate_keep import keeping, passed
from launch.evaluate_settings import (
    CLAIM,
    Outcome,
    Settings,
    about_overlap,
    compared,
    console,
    describe,
    form_of,
    load_model,
    overlap_of,
)
from moejax.evals import sandbox
from moejax.evals.run import RunConfig, answer_fn, grade_samples, require_grader, run
from moejax.evals.samples import read_samples, write_samples
from moejax.evals.scores import UNSCORED, check_ks, summary
from moejax.evals.tasks import TASKS, Grading, Item, Task, load_items, with_shots
from moejax.evals.tasks.own import GRADERS
from moejax.serve.generate import GenerateConfig
from moejax.serve.sampling import SamplingConfig
from moejax.train.loop import claim_folder

Record = dict[str, Any]


def evaluate(settings: Settings) -> Outcome | None:
    """Asks the model, or grades a file, and prints Pass@k; None after a dry run."""
    task = GRADERS[settings.grader] if settings.grader else TASKS[settings.task]
    items = load_items(task, settings.data, settings.num)
    items = with_shots(task, items, settings.shots, settings.shots_data, settings.seed)
    form = form_of(settings, task)
    config = RunConfig(
        form=form,
        num_samples=settings.num_samples,
        chunk_size=settings.batch_size or 32,
        seed=settings.seed,
        grading=Grading(
            settings.limits,
            settings.package_folders,
            allow_code_execution=settings.execute,
        ),
        overlap=overlap_of(settings),
    )
    if settings.dry_run:
        _plan(settings, task, items, form)
        return None
    if task.executes:
        sandbox.require_permission(settings.execute)
        require_grader(task)
    if settings.samples is not None:
        asked, records, ks = _grade_file(settings, task, items, config)
    else:
        ks = settings.ks or _default_ks(settings.num_samples)
        check_ks({"each problem": settings.num_samples}, ks)
        asked = _asked(settings, task, items, form)
        records = _ask(settings, task, items, config, asked)
    if task.executes:
        asked["sandbox"] = sandbox.working_mode()
    result = summary(records, ks) | about_overlap(settings, config.overlap, records)
    if task.name.startswith(("humaneval", "mbpp")):
        programs = [{"task_id": r["id"], "solution": r["extracted"]} for r in records]
        write_samples(settings.out / "evalplus.jsonl", programs)
    _say(task, records, result)
    result |= compared(settings, records)
    return asked, records, result


def _default_ks(num_samples: int) -> tuple[int, ...]:
    return tuple(k for k in (1, 10, 100) if k <= num_samples)


def _grade_file(settings: Settings, task: Task, items: Sequence[Item], config: RunConfig):
    assert settings.samples is not None
    samples = read_samples(settings.samples, [item.id for item in items], partial=settings.partial)
    per_item = Counter(sample["id"] for sample in samples)
    ks = settings.ks or _default_ks(min(per_item.values()))
    check_ks(per_item, ks)
    asked: Record = {
        "task": task.name,
        "samples": str(settings.samples),
        "data": settings.data or task.source,
        "num_tasks": len(items),
        "form": config.form,
    }
    claim_folder(settings.out, asked, CLAIM)
    with keeping(settings, len(samples), passed) as (done, keep):
        records = grade_samples(samples, task, items, config, done=done, on_records=keep)
    if len(per_item) < len(items):
        asked["num_missing"] = len(items) - len(per_item)
    return asked, records, ks


def _ask(
    settings: Settings, task: Task, items: Sequence[Item], config: RunConfig, asked: Record
) -> list[Record]:
    loaded = load_model(settings)
    claim_folder(settings.out, asked, CLAIM)
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    total = len(items) * config.num_samples
    drawing = GenerateConfig(
        max_new_tokens=settings.max_new_tokens,
        sampling=SamplingConfig(temperature=settings.temperature, top_p=settings.top_p),
        stop_ids=tuple(tokenizer.eos_ids),
        seed=settings.seed,
        batch_size=min(config.chunk_size, total),
        options=settings.options,
    )
    names = ("max_new_tokens", "temperature", "top_p", "dtype", "model")
    kept = {name: asked[name] for name in names}
    config = dataclasses.replace(config, settings=kept)
    answer = answer_fn(loaded.params, loaded.config, tokenizer, drawing)
    with keeping(settings, total, passed) as (done, keep):
        return run(answer, tokenizer, task, items, config, done=done, on_records=keep)


def _asked(settings: Settings, task: Task, items: Sequence[Item], form: str) -> Record:
    return {
        "task": task.name,
        "model": settings.model,
        "data": settings.data or ("shipped" if task.name == "functions" else task.source),
        "num_tasks": len(items),
        "form": form,
        "shots": settings.shots,
        "num_samples": settings.num_samples,
        "batch_size": settings.batch_size or 32,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "limits": dataclasses.asdict(settings.limits),
    }


def _plan(settings: Settings, task: Task, items: Sequence[Item], form: str) -> None:
    where = f"; sandbox mode {sandbox.working_mode()!r}" if task.executes else ""
    weak = sum(bool(item.weak) for item in items)
    console.print(
        f"{task.name}: {len(items)} tasks x {settings.num_samples} answers, prompt form {form!r}, "
        f"at most {settings.max_new_tokens} new tokens{where}"
        + (f"; {weak} with tests that share the program's process" if weak else ""),
        markup=False,
    )
    if settings.samples is None:
        describe(load_model(settings))


def _say(task: Task, records: Sequence[Record], result: Record) -> None:
    unscored = [record for record in records if record["verdict"] == UNSCORED]
    if unscored:
        reasons = Counter(record["reason"] for record in unscored)
        for reason, count in reasons.most_common():
            console.print(f"{count} of {len(records)} not scored: {reason}", markup=False)
    if result["pass_at_1"] is None:
        return
    low, high = result["pass_at_1_interval"]
    words = ", ".join(f"{word} {count}" for word, count in result["verdicts"].items())
    console.print(
        f"pass@1 {result['pass_at_1']:.3f} [{low:.3f}, {high:.3f}], "
        f"{result['pass_at_1_n']} tasks; {words}",
        markup=False,
    )
    for name in ("pass_at_k", "maj_at_k", "best_at_k"):
        for k, value in result.get(name, {}).items():
            if k != "1":
                low, high = result.get(f"{name}_interval", {}).get(k, (value, value))
                text = f"{name[:-4]}@{k} {value:.3f} [{low:.3f}, {high:.3f}]"
                console.print(text, markup=False)
    if result["num_weak"]:
        console.print(
            f"{result['num_weak']} answers were judged by tests that share the program's process",
            markup=False,
        )
