"""A task from prompts to records: asked, answered, judged, in chunks that a later run can skip."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moejax.core.errors import InputError
from moejax.evals import sandbox
from moejax.evals.scores import UNSCORED
from moejax.evals.tasks.base import Grading, Item, Prompt, Task, cut
from moejax.io.tokenizer import Tokenizer
from moejax.serve.generate import Completion

Record = dict[str, Any]
# Prompts as ids, and a seed, to completions in their order.
GenerateFn = Callable[[Sequence[Sequence[int]], int], Sequence[Completion]]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a task is asked and judged.

    Attributes:
      form: one of the task's prompt forms, the same for all models that are compared; None: its
        first.
      num_samples: answers per item.
      chunk_size: answers generated, judged and reported together; with `seed` it fixes the samples.
      seed: chunk c is generated with seed + c.
      grading: how programs are run.
      settings: how answers were drawn, for the records.
      overlap: per item, its share of n-grams that training data has (decontaminate.py).
    """

    form: str | None = None
    num_samples: int = 1
    chunk_size: int = 32
    seed: int = 0
    grading: Grading = Grading()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    overlap: Mapping[str, float] = dataclasses.field(default_factory=dict)


def run(
    generate: GenerateFn,
    tokenizer: Tokenizer,
    task: Task,
    items: Sequence[Item],
    config: RunConfig,
    *,
    done: Iterable[Record] = (),
    on_records: Callable[[list[Record]], None] | None = None,
) -> list[Record]:
    """Returns one record per item and sample: the reply, what was extracted, and its verdict.

    Args:
      done: records of an earlier run with the same config, which are not made again.
      on_records: called with each chunk's new records.

    Raises:
      InputError: a task that runs programs, without allow_code_execution; nothing is generated.
    """
    if task.executes:
        sandbox.require_permission(config.grading.allow_code_execution)
    form = task.form(config.form)
    wanted = [(item, sample) for sample in range(config.num_samples) for item in items]
    known = {(record["id"], record["sample"]): record for record in done}
    records: list[Record] = []
    for chunk, start in enumerate(range(0, len(wanted), config.chunk_size)):
        part = wanted[start : start + config.chunk_size]
        kept = [known.get((item.id, sample)) for item, sample in part]
        if all(record is not None for record in kept):
            records += [record for record in kept if record is not None]
            continue
        samples = _generate(generate, tokenizer, task, part, form, config.seed + chunk)
        new = grade(samples, task, items, config)
        records += new
        if on_records is not None:
            on_records(new)
    return records


def _generate(
    generate: GenerateFn,
    tokenizer: Tokenizer,
    task: Task,
    part: Sequence[tuple[Item, int]],
    form: str,
    seed: int,
) -> list[Record]:
    prompts = [task.forms[form](item) for item, _ in part]
    began = time.perf_counter()
    completions = generate([encode_prompt(tokenizer, prompt) for prompt in prompts], seed)
    seconds = time.perf_counter() - began
    records = []
    for (item, sample), prompt, completion in zip(part, prompts, completions, strict=True):
        whole = tokenizer.decode(completion.ids)
        text = cut(whole, prompt.stop)
        chat = prompt.message is not None
        records.append(
            {
                "id": item.id,
                "sample": sample,
                "seed": seed,
                "prompt": prompt.message if chat else prompt.prefix,
                "completion": prompt.prefix + text if chat else text,
                "num_tokens": len(completion.ids),
                "finished": completion.finished or len(text) < len(whole),
                "generate_s": round(seconds / len(part), 4),
            }
        )
    return records


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Ids of what the model reads: its chat template and the answer's start, or plain text."""
    if prompt.message is None:
        return tokenizer.encode(prompt.prefix, add_special=True)
    ids = tokenizer.encode_prompt([{"role": "user", "content": prompt.message}])
    return ids + (tokenizer.encode(prompt.prefix) if prompt.prefix else [])


def grade(
    samples: Sequence[Mapping[str, Any]], task: Task, items: Sequence[Item], config: RunConfig
) -> list[Record]:
    """Returns the samples ("id", "sample", and "completion" or "solution"), each with its verdict.

    Adds "task", "form", "extracted", "passed" (None where it could not be graded), "verdict",
    "reason", "run_s", "weak", "answer", "settings" and "overlap".
    """
    form, by_id = task.form(config.form), {item.id: item for item in items}
    extracted = [
        sample["solution"]
        if "solution" in sample
        else task.extract(by_id[sample["id"]], form, sample["completion"])
        for sample in samples
    ]
    pairs = [(by_id[s["id"]], text) for s, text in zip(samples, extracted, strict=True)]
    grades = task.grade(pairs, config.grading)
    records = []
    for sample, text, judged in zip(samples, extracted, grades, strict=True):
        if sample.get("prompt") is None:
            asked = task.forms[form](by_id[sample["id"]])
            sample = {**sample, "prompt": asked.prefix if asked.message is None else asked.message}
        added = {
            "task": task.name,
            "form": form,
            "extracted": text,
            "passed": None if judged.verdict == UNSCORED else judged.passed,
            "verdict": judged.verdict,
            "reason": judged.reason,
            "run_s": judged.seconds,
            "weak": judged.weak,
            "answer": judged.answer,
            "settings": dict(config.settings),
            "overlap": config.overlap.get(sample["id"]),
        }
        records.append({"seed": None, **sample, **added})
    return records


def grade_samples(
    samples: Sequence[Record],
    task: Task,
    items: Sequence[Item],
    config: RunConfig,
    *,
    done: Iterable[Record] = (),
    on_records: Callable[[list[Record]], None] | None = None,
) -> list[Record]:
    """`grade`, chunk by chunk; samples whose very same completion is in `done` are not run again.

    Raises:
      InputError: a task that runs programs, without allow_code_execution.
    """
    if task.executes:
        sandbox.require_permission(config.grading.allow_code_execution)
    known = {_key(record): record for record in done}
    records = {_key(s): known[_key(s)] for s in samples if _key(s) in known}
    left = [sample for sample in samples if _key(sample) not in records]
    if records and on_records is not None:
        on_records(list(records.values()))
    for start in range(0, len(left), config.chunk_size):
        new = grade(left[start : start + config.chunk_size], task, items, config)
        records |= {_key(record): record for record in new}
        if on_records is not None:
            on_records(new)
    return [records[_key(sample)] for sample in samples]


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record["id"], record["sample"], record.get("completion"), record.get("solution")


def require_grader(task: Task) -> None:
    """Raises InputError where this machine has no sandbox for a task that needs one."""
    if task.executes:
        try:
            sandbox.working_mode()
        except InputError as error:
            raise InputError(f"task {task.name} runs programs, but {error}") from error
