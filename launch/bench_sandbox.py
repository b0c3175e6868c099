"""Rows of the sandbox: Python programs graded per second on this machine's cores.

The shipped function tasks, each with its right and its wrong solution, are graded in both ways that
there are: calls whose results are compared here, and asserts in a process of their own beside the
program's. Verdicts must be right, or there is no figure. Nothing but processes is started, so
another machine's cores count as they are: the goal is for two.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence

from launch.bench_row import Row, Wanted
from moejax.core.errors import InputError
from moejax.evals import sandbox
from moejax.evals.sandbox_process import Exam, Job
from moejax.evals.tasks import Grading, load_items
from moejax.evals.tasks.base import Item
from moejax.evals.tasks.functions import FUNCTIONS

NUM_ROUNDS = 3


def rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """Programs per second, with calls and with tests apart."""
    del peer
    sandbox.working_mode()  # tried before the clock runs
    items = load_items(FUNCTIONS)
    pairs = [(item, item.row[field]) for item in items for field in ("solution", "mutant")]
    right = [True, False] * len(items)
    for figure, grade in (("calls", _by_calls), ("tests in their own process", _by_exams)):
        name = f"cpu Python programs graded, {figure}"
        if wanted(name):
            yield _row(name, grade, pairs, right)


def _row(name: str, grade, pairs: Sequence[tuple[Item, str]], right: list[bool]) -> Row:
    rates = []
    for _ in range(NUM_ROUNDS):
        began = time.perf_counter()
        found = grade(pairs)
        rates.append(len(pairs) / (time.perf_counter() - began))
        if found != right:
            raise InputError(f"{name}: a program got the wrong verdict; a rate would mean nothing")
    how = (
        f"{len(pairs)} programs, median of {NUM_ROUNDS} ({min(rates):.1f} to {max(rates):.1f}); "
        f"mode {sandbox.working_mode()}, {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f}"
    )
    return Row(name, statistics.median(rates), "programs/s", ">= 20", how=how)


def _by_calls(pairs: Sequence[tuple[Item, str]]) -> list[bool]:
    grades = FUNCTIONS.grade(pairs, Grading(allow_code_execution=True))
    return [grade.passed for grade in grades]


def _by_exams(pairs: Sequence[tuple[Item, str]]) -> list[bool]:
    jobs = [Job(program, exam=Exam(_asserts(item), [item.row["name"]])) for item, program in pairs]
    verdicts = sandbox.run_many(jobs, allow_code_execution=True)
    return [verdict.results == ({"value": True},) for verdict in verdicts]


def _asserts(item: Item) -> str:
    return "\n".join(
        f"assert candidate(*{test['args']!r}) == {test['expected']!r}"
        for test in item.row["tests"]
    )
