"""Verdicts on Python programs: tests in a process of their own, or beside the program where the
tests leave no other way (such verdicts are marked weak).
"""

from __future__ import annotations

import secrets
import sysconfig
from collections.abc import Sequence
from typing import Any

from moejax.evals import sandbox
from moejax.evals.sandbox import Verdict
from moejax.evals.sandbox_process import Exam, Job
from moejax.evals.tasks.base import Grade, Grading, Item

# What EvalPlus's own runner does beyond ==: floats to 1e-6, some MBPP answers as sets.
_PLUS_TEST = """
import copy as _copy
import math as _math

def _same(got, expected, tolerance):
    if got == expected:
        return True
    if isinstance(expected, float) and isinstance(got, (int, float)):
        limit = tolerance or 1e-6
        return abs(got - expected) <= limit + 1e-7 * abs(expected)
    if isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple)):
        return len(got) == len(expected) and all(map(_same, got, expected, [tolerance] * len(got)))
    return False

for _arguments in _inputs:
    _expected = _reference(*_copy.deepcopy(_arguments))
    _got = candidate(*_copy.deepcopy(_arguments))
    if _entry == "find_zero":
        _space = _reference.__globals__
        assert abs(_space["poly"](_arguments[0], _got)) <= (_tolerance or 1e-4), _arguments
    else:
        assert _same(_got, _expected, _tolerance), _arguments
"""


def grade(pairs: Sequence[tuple[Item, str]], grading: Grading) -> list[Grade]:
    """Runs each program against its item's tests."""
    grades = _grade([(item, program, bool(item.weak)) for item, program in pairs], grading)
    # The tests' own arguments were no plain data (a class, say): those tests need the weaker way.
    again = [i for i, judged in enumerate(grades) if judged.reason.startswith("cannot cross")]
    for i, judged in zip(again, _grade([(*pairs[i], True) for i in again], grading), strict=True):
        grades[i] = judged
    return grades


def _grade(triples: Sequence[tuple[Item, str, bool]], grading: Grading) -> list[Grade]:
    nonces = [secrets.token_hex(8) if weak else "" for _, _, weak in triples]
    jobs = [
        _job(item, program, nonce, grading)
        for (item, program, _), nonce in zip(triples, nonces, strict=True)
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
    for (item, program, weak), nonce in zip(triples, nonces, strict=True):
        if not program:
            entry = item.row["exam"]["entry"]
            grades.append(Grade("no program", f"no {entry} in the reply", 0.0, weak))
        elif weak:
            grades.append(judge_alone(next(verdicts), nonce))
        else:
            grades.append(_judge_exam(next(verdicts)))
    return grades


def _job(item: Item, program: str, nonce: str, grading: Grading) -> Job:
    exam = item.row["exam"]
    packages = _packages(exam["setup"] + exam["test"], grading)
    if nonce:
        bind = f"candidate = {exam['entry']}"
        parts = [exam["setup"], program, bind, exam["test"], f"print('\\n{nonce}')"]
        return Job("\n\n".join(parts), packages=packages)
    if exam["plus"]:
        return Job(program, exam=_plus_exam(item.row), packages=packages)
    return Job(program, exam=Exam(exam["test"], exam["names"], exam["setup"]), packages=packages)


def _plus_exam(row: Any) -> Exam:
    inputs = [*(row.get("base_input") or []), *row["plus_input"]]
    entry = row["entry_point"]
    lines = [
        f"_space = {{}}\nexec({row['exam']['setup']!r}, _space)",
        f"_reference, _entry = _space[{entry!r}], {entry!r}",
        f"_inputs, _tolerance = {inputs!r}, {float(row.get('atol') or 0)!r}",
    ]
    return Exam(_PLUS_TEST, [entry], "\n".join(lines))


def _packages(source: str, grading: Grading) -> tuple[str, ...]:
    """Folders of packages, where the tests themselves need one (the plus sets' need numpy)."""
    if "import numpy" not in source and "from numpy" not in source:
        return ()
    return (sysconfig.get_path("purelib"), *grading.package_folders)


def _judge_exam(verdict: Verdict) -> Grade:
    seconds = round(verdict.wall_s, 4)
    if verdict.status != "ok":
        word = {"signal": "crash"}.get(verdict.status, verdict.status)
        return Grade(word, clean(verdict.reason), seconds)
    outcome = verdict.results[0] if verdict.results else {"error": "no word from the tests"}
    if outcome.get("value") is True:
        return Grade("pass", "", seconds)
    reason = clean(str(outcome.get("error", "an unreadable verdict")))
    word = "wrong" if reason.startswith("AssertionError") else "error"
    return Grade(word, reason, seconds)


def judge_alone(verdict: Verdict, nonce: str) -> Grade:
    """A program that held its own tests: it must have come to their end, and said so."""
    seconds = round(verdict.wall_s, 4)
    if verdict.status == "ok" and verdict.stdout.rstrip().splitlines()[-1:] == [nonce]:
        return Grade("pass", "", seconds, weak=True)
    if verdict.status == "ok":
        return Grade("error", "it ended before its tests did", seconds, weak=True)
    wrong = "AssertionError" in verdict.reason
    word = {"signal": "crash"}.get(verdict.status, verdict.status)
    return Grade("wrong" if wrong else word, clean(verdict.reason), seconds, weak=True)


def clean(text: str) -> str:
    """One line that can be written as UTF-8: a lone surrogate is no text."""
    return " ".join(text.encode("utf-8", "replace").decode().split())[:400]
