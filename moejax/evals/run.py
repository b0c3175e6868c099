"""A task from prompts to records: asked, answered, judged; a later run goes on where one ended."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.evals import sandbox
from moejax.evals.scores import UNSCORED
from moejax.evals.tasks.base import Grading, Item, Prompt, Task, cut
from moejax.io.tokenizer import Tokenizer
from moejax.models.config import ModelConfig
from moejax.serve.engine import Engine
from moejax.serve.generate import Completion, GenerateConfig
from moejax.serve.prepare import bucket, check_prompts, context_length, power_of_two, prepare
from moejax.serve.request import EngineConfig, Request

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Question:
    """What a generator is asked.

    Attributes:
      ids: the prompt.
      stop: texts that end an answer.
      index: the first sample's number in the whole run, which makes its random key.
      num_samples: answers wanted.
    """

    ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    index: int = 0
    num_samples: int = 1


# Questions, and the tokens of the longest prompt of the whole run, answered before or not, to
# (place of the question, sample, completion) as they are done. A sample may depend on its prompt,
# its index and the longest prompt; not on what else is asked.
AnswerFn = Callable[[Sequence[Question], int], Iterable[tuple[int, int, Completion]]]


def answer_fn(
    params: tree.Tree, config: ModelConfig, tokenizer: Tokenizer, drawing: GenerateConfig
) -> AnswerFn:
    """Answers by the engine, with the same `batch_size` slots whatever is left to be answered."""
    params = prepare(params, drawing.options.compute_dtype)

    def answer(questions: Sequence[Question], longest: int):
        check_prompts(config, [question.ids for question in questions])
        most = min(longest + drawing.max_new_tokens, context_length(config))
        settings = EngineConfig(
            num_slots=drawing.batch_size,
            max_length=bucket(most),
            max_stop_ids=power_of_two(len(drawing.stop_ids) or 1, least=8),
            options=drawing.options,
        )
        engine = Engine(params, config, settings, tokenizer.decode)
        requests = [
            Request(
                question.ids,
                drawing.max_new_tokens,
                drawing.sampling,
                drawing.seed,
                question.index,
                question.num_samples,
                drawing.stop_ids,
                question.stop,
            )
            for question in questions
        ]
        for place, sample, found in engine.answers(requests):
            yield place, sample, Completion.of(found)

    return answer


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How a task is asked and judged.

    Attributes:
      form: one of the task's prompt forms, the same for all models that are compared; None: its
        first.
      num_samples: answers per item.
      chunk_size: answers judged and reported together.
      seed: of the answers, for the records.
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
    answer: AnswerFn,
    tokenizer: Tokenizer,
    task: Task,
    items: Sequence[Item],
    config: RunConfig,
    *,
    done: Iterable[Record] = (),
    on_records: Callable[[list[Record]], None] | None = None,
) -> list[Record]:
    """Returns one record per item and sample: the reply, what was extracted, and its verdict.

    Samples of one item are numbered together, so that its prompt is read once for all of them.

    Args:
      done: records of an earlier run with the same config, which are not made again.
      on_records: called first with those of them that belong here, then with each chunk's new ones.

    Raises:
      InputError: a task that runs programs, without allow_code_execution; nothing is generated.
    """
    if task.executes:
        sandbox.require_permission(config.grading.allow_code_execution)
    report = on_records or (lambda _: None)
    prompts = [task.forms[task.form(config.form)](item) for item in items]
    ids = [tuple(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    wanted = [(item.id, sample) for item in items for sample in range(config.num_samples)]
    there = {(record["id"], record["sample"]): record for record in done}
    records = {key: there[key] for key in wanted if key in there}
    if records:
        report(list(records.values()))
    questions, owners = _questions(items, prompts, ids, config.num_samples, records)
    if not questions:
        return [records[key] for key in wanted]
    new: list[Record] = []
    began = time.perf_counter()

    def judge() -> None:
        seconds = round((time.perf_counter() - began) / len(new), 4)
        judged = grade([{**one, "generate_s": seconds} for one in new], task, items, config)
        records.update({(record["id"], record["sample"]): record for record in judged})
        report(judged)

    for place, sample, completion in answer(questions, max(map(len, ids))):
        number, first = owners[place]
        key = {"id": items[number].id, "sample": first + sample, "seed": config.seed}
        new.append(key | _reply(tokenizer, prompts[number], completion))
        if len(new) == config.chunk_size:
            judge()
            new, began = [], time.perf_counter()
    if new:
        judge()
    return [records[key] for key in wanted]


def _questions(items, prompts, ids, num_samples: int, there):
    """What is left to be asked, and of each question its item's number and first sample."""
    questions, owners = [], []
    for number, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
        left = [sample for sample in range(num_samples) if (item.id, sample) not in there]
        for first, length in _stretches(left):
            index = number * num_samples + first
            questions.append(Question(ids[number], prompt.stop, index, length))
            owners.append((number, first))
    return questions, owners


def _stretches(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, length) of each stretch of neighbours in ascending numbers."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and sum(found[-1]) == number:
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((number, 1))
    return found


def _reply(tokenizer: Tokenizer, prompt: Prompt, completion: Completion) -> Record:
    whole = completion.text or tokenizer.decode(completion.ids)
    text, chat = cut(whole, prompt.stop), prompt.message is not None
    return {
        "prompt": prompt.message if chat else prompt.prefix,
        "completion": prompt.prefix + text if chat else text,
        "num_tokens": len(completion.ids),
        "finished": completion.finished or len(text) < len(whole),
    }


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
