"""The shipped easy tasks: one small Python function each, with hidden tests as plain data.

They separate models of about 100 million parameters, which solve next to nothing of HumanEval. A
user's own tasks of this kind: a JSONL file with id, name, signature, description and tests:
[{"args": [...], "expected": ...}].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from moejax.core.errors import InputError
from moejax.evals import plain, sandbox
from moejax.evals.extract import extract_program
from moejax.evals.sandbox import Verdict
from moejax.evals.sandbox_process import Job
from moejax.evals.tasks.base import Grade, Grading, Item, Prompt, Task
from moejax.evals.tasks.python_grade import clean

SHIPPED = str(resources.files("moejax.evals") / "tasks" / "functions.jsonl")
_QUESTION = "Write a Python function {signature} that {description}."


def make_item(row: Mapping[str, Any], number: int, where: str) -> Item:
    """Checks that the tests are pairs of arguments and an expected result."""
    tests = row["tests"]
    if not isinstance(tests, list) or not tests:
        raise InputError(f"{where}: task {row['id']!r} has 0 tests, at least 1 is needed")
    for test in tests:
        if not isinstance(test, dict) or not {"args", "expected"} <= test.keys():
            raise InputError(f"{where}: not a task: a test has 'args' and 'expected', not {test}")
    for name in ("id", "name", "signature", "description"):
        if not isinstance(row[name], str):
            kind = type(row[name]).__name__
            raise InputError(f"{where}: not a task: {name!r} is {kind}, not text")
    return Item(row["id"], row)


def chat(item: Item) -> Prompt:
    """A user's turn."""
    return Prompt(_QUESTION.format(**item.row), "")


def fence(item: Item) -> Prompt:
    """A user's turn, and the answer's first line given."""
    start = f"```python\ndef {item.row['signature']}:\n"
    return Prompt(_QUESTION.format(**item.row), start)


def extract(item: Item, form: str, text: str) -> str:
    """The program in a reply."""
    return extract_program(text, item.row["name"])


def grade(pairs: Sequence[tuple[Item, str]], grading: Grading) -> list[Grade]:
    """Makes each test's call in the sandbox and compares here."""
    jobs = [
        Job(program, item.row["name"], [test["args"] for test in item.row["tests"]])
        for item, program in pairs
        if program
    ]
    verdicts = iter(
        sandbox.run_many(
            jobs,
            grading.limits,
            allow_code_execution=grading.allow_code_execution,
            num_workers=grading.num_workers,
        )
    )
    grades = []
    for item, program in pairs:
        if program:
            verdict = next(verdicts)
            word, reason = judge(item, verdict)
            grades.append(Grade(word, clean(reason), round(verdict.wall_s, 4)))
        else:
            grades.append(Grade("no program", f"no {item.row['name']} in the reply"))
    return grades


def judge(item: Item, verdict: Verdict) -> tuple[str, str]:
    """Compares a program's results with the task's hidden ones: a word and the reason."""
    tests = item.row["tests"]
    for number, (test, result) in enumerate(zip(tests, verdict.results, strict=False), 1):
        call = f"{item.row['name']}({', '.join(map(repr, test['args']))})"[:200]
        if "error" in result:
            return "error", f"test {number}: {call} raised {result['error']}"
        if not plain.equal(result["value"], test["expected"]):
            got = repr(result["value"])[:200]
            return "wrong", f"test {number}: {call} is {got}, not {test['expected']!r}"
    if len(verdict.results) == len(tests) and verdict.status == "ok":
        return "pass", ""
    word = {"ok": "error", "signal": "crash"}.get(verdict.status, verdict.status)
    ended = f"it ended after {len(verdict.results)} of {len(tests)} calls"
    return word, f"{verdict.reason}; {ended}"


FUNCTIONS = Task(
    name="functions",
    source=SHIPPED,
    fields=(("id", "name", "signature", "description", "tests"),),
    make=make_item,
    forms={"chat": chat, "fence": fence},
    extract=extract,
    grade=grade,
    executes=True,
)
