"""Function tasks on a model: ask, find the program in the answer, run it, compare the results."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moejax.core.errors import InputError
from moejax.evals import bootstrap, pass_at_k, plain, sandbox
from moejax.evals.bootstrap import Interval
from moejax.evals.extract import extract_program
from moejax.evals.sandbox import Job, Limits, Verdict
from moejax.evals.tasks_functions import FunctionTask, prompt
from moejax.io.tokenizer import Tokenizer
from moejax.serve.generate import Completion

Record = dict[str, Any]
# Prompts as ids, and a seed, to completions in their order.
GenerateFn = Callable[[Sequence[Sequence[int]], int], Sequence[Completion]]


@dataclasses.dataclass(frozen=True)
class FunctionsConfig:
    """How tasks are asked and run.

    Attributes:
      form: one of tasks_functions.PROMPT_FORMS, the same for all models that are compared.
      num_samples: answers per task.
      chunk_size: answers generated, run and reported together; with `seed` it fixes the samples.
      seed: chunk c is generated with seed + c.
      limits: of the sandbox.
      allow_code_execution: must be True, since the models' programs are run.
    """

    form: str = "chat"
    num_samples: int = 1
    chunk_size: int = 32
    seed: int = 0
    limits: Limits = Limits()
    allow_code_execution: bool = False


def run_functions(
    generate: GenerateFn,
    tokenizer: Tokenizer,
    tasks: Sequence[FunctionTask],
    config: FunctionsConfig,
    *,
    done: Iterable[Record] = (),
    on_records: Callable[[list[Record]], None] | None = None,
) -> list[Record]:
    """Returns one record per task and sample: the reply, the program found, and its verdict.

    Args:
      done: records of an earlier run with the same config, which are not made again.
      on_records: called with all records so far after each chunk.

    Raises:
      InputError: without allow_code_execution, before anything is generated.
    """
    sandbox.require_permission(config.allow_code_execution)
    wanted = [(task, sample) for sample in range(config.num_samples) for task in tasks]
    known = {(record["id"], record["sample"]): record for record in done}
    records: list[Record] = []
    for chunk, start in enumerate(range(0, len(wanted), config.chunk_size)):
        part = wanted[start : start + config.chunk_size]
        kept = [known.get((task.id, sample)) for task, sample in part]
        if all(record is not None for record in kept):
            records += [record for record in kept if record is not None]
            continue
        samples = _generate(generate, tokenizer, part, config, config.seed + chunk)
        records += grade(samples, tasks, config)
        if on_records is not None:
            on_records(records)
    return records


def _generate(
    generate: GenerateFn,
    tokenizer: Tokenizer,
    part: Sequence[tuple[FunctionTask, int]],
    config: FunctionsConfig,
    seed: int,
) -> list[Record]:
    texts = [prompt(task, config.form) for task, _ in part]
    ids = [
        tokenizer.encode_prompt([{"role": "user", "content": message}])
        + (tokenizer.encode(prefix) if prefix else [])
        for message, prefix in texts
    ]
    began = time.perf_counter()
    completions = generate(ids, seed)
    seconds = time.perf_counter() - began
    return [
        {
            "id": task.id,
            "sample": sample,
            "form": config.form,
            "seed": seed,
            "prompt": message,
            "completion": prefix + tokenizer.decode(completion.ids),
            "num_tokens": len(completion.ids),
            "finished": completion.finished,
            "generate_s": round(seconds / len(part), 4),
        }
        for (task, sample), (message, prefix), completion in zip(
            part, texts, completions, strict=True
        )
    ]


def grade(
    samples: Sequence[Mapping[str, Any]], tasks: Sequence[FunctionTask], config: FunctionsConfig
) -> list[Record]:
    """Returns the samples ("id", "sample", "completion"), each with its verdict.

    Adds "extracted" (the program), "passed", "verdict" ("pass", "wrong" value, "error", "timeout",
    "output", "crash", or "no function"), "reason" (the first call that failed) and "run_s".
    """
    by_id = {task.id: task for task in tasks}
    programs = [extract_program(s["completion"], by_id[s["id"]].name) for s in samples]
    jobs = [
        Job(program, by_id[s["id"]].name, [arguments for arguments, _ in by_id[s["id"]].tests])
        for program, s in zip(programs, samples, strict=True)
    ]
    verdicts = iter(
        sandbox.run_many(
            [job for job in jobs if job.program],
            config.limits,
            allow_code_execution=config.allow_code_execution,
        )
    )
    records = []
    for sample, program in zip(samples, programs, strict=True):
        if program:
            verdict = next(verdicts)
            word, reason = judge(by_id[sample["id"]], verdict)
            reason = reason.encode("utf-8", "replace").decode()  # a lone surrogate is no text
            run_s = round(verdict.wall_s, 4)
        else:
            word, reason, run_s = "no function", f"no {by_id[sample['id']].name} in the reply", 0.0
        judged = {"extracted": program, "passed": word == "pass", "verdict": word}
        records.append({**sample, **judged, "reason": reason, "run_s": run_s})
    return records


def judge(task: FunctionTask, verdict: Verdict) -> tuple[str, str]:
    """Compares a program's results with the task's hidden ones: a word and the reason."""
    tests = zip(task.tests, verdict.results, strict=False)
    for number, ((arguments, expected), result) in enumerate(tests, 1):
        call = f"{task.name}({', '.join(map(repr, arguments))})"[:200]
        if "error" in result:
            return "error", f"test {number}: {call} raised {result['error']}"
        if not plain.equal(result["value"], expected):
            got = repr(result["value"])[:200]
            return "wrong", f"test {number}: {call} is {got}, not {expected!r}"
    if len(verdict.results) == len(task.tests) and verdict.status == "ok":
        return "pass", ""
    word = {"ok": "error", "signal": "crash"}.get(verdict.status, verdict.status)
    ended = f"it ended after {len(verdict.results)} of {len(task.tests)} calls"
    return word, f"{verdict.reason}; {ended}"


def counts(records: Sequence[Record]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Returns the tasks' ids in order, and per task the number of samples and of passes."""
    samples = Counter(record["id"] for record in records)
    passes = Counter(record["id"] for record in records if record["passed"])
    ids = list(samples)
    return ids, np.array([samples[i] for i in ids]), np.array([passes[i] for i in ids])


def pass_at_1(records: Sequence[Record]) -> Interval:
    """The share of tasks passed: Wilson's interval, or the bootstrap over tasks of c / n."""
    _, num_samples, num_passed = counts(records)
    if (num_samples == 1).all():
        return bootstrap.wilson(int(num_passed.sum()), len(num_passed))
    return bootstrap.mean(num_passed / num_samples)


def summary(records: Sequence[Record], ks: Sequence[int] = (1,)) -> dict[str, Any]:
    """Pass@1 with its interval, Pass@k for `ks`, and how often each verdict came up.

    Raises:
      InputError: a k larger than the number of samples of some task.
    """
    ids, num_samples, num_passed = counts(records)
    if max(ks, default=1) > num_samples.min():
        task = ids[int(num_samples.argmin())]
        raise InputError(f"k = {max(ks)} needs as many samples; {task!r} has {num_samples.min()}")
    interval = pass_at_1(records)
    shares = {str(k): float(pass_at_k.estimate(num_samples, num_passed, k).mean()) for k in ks}
    return {
        "pass_at_1": interval.mean,
        "pass_at_1_interval": [interval.low, interval.high],
        "pass_at_1_n": len(ids),
        "num_answers": len(records),
        "pass_at_k": shares,
        "verdicts": dict(Counter(record["verdict"] for record in records)),
    }


def minus(records_a: Sequence[Record], records_b: Sequence[Record]) -> Interval:
    """The paired difference in Pass@1 of two models on the same tasks.

    Raises:
      ValueError: the tasks differ.
    """
    (ids_a, n_a, c_a), (ids_b, n_b, c_b) = counts(records_a), counts(records_b)
    if sorted(ids_a) != sorted(ids_b):
        raise ValueError(f"{len(ids_a)} and {len(ids_b)} tasks, which are not the same")
    order = [ids_b.index(name) for name in ids_a]
    n_b, c_b = n_b[order], c_b[order]
    if (n_a == 1).all() and (n_b == 1).all():
        return bootstrap.paired_share(c_a == 1, c_b == 1)
    return bootstrap.paired_mean(c_a / n_a, c_b / n_b)


def choose_form(results: Mapping[str, Sequence[Record]]) -> str:
    """Returns the prompt form with the most passes; of equals the first.

    Chosen on the base model and then used for every row, it can only favour the base.
    """
    if not results:
        raise ValueError("no results to choose a form from")
    return max(results, key=lambda form: sum(record["passed"] for record in results[form]))
