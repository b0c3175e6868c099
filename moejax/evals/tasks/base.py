"""What every task is made of: items read from rows, prompt forms, and a grader of completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moejax.core.errors import InputError
from moejax.evals.sandbox import Limits


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model reads.

    Attributes:
      message: a user's turn, put into the model's chat template; None to continue plain text.
      prefix: the start of the answer; with no message, the text to continue.
      stop: texts that end a completion and are not part of it.
    """

    message: str | None
    prefix: str
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Item:
    """One problem.

    Attributes:
      id: unlike any other's in its set.
      row: what was read, and what the task's `make` put beside it.
      weak: why its tests cannot run apart from the program, "" if they can.
      shots: solved problems that are shown before it.
    """

    id: str
    row: Mapping[str, Any]
    weak: str = ""
    shots: tuple[Item, ...] = ()


@dataclasses.dataclass(frozen=True)
class Grade:
    """A verdict, its reason, and what it rests on.

    Attributes:
      verdict: "pass"; "wrong" (a value), "error", "timeout", "output", "crash", "compile", "no
        program", "no answer": these count as failed; "unscored": the machine lacks what grading
        needs, which counts as nothing.
      reason: one line.
      seconds: how long grading took.
      weak: the candidate shared a process with its tests, and could have tampered with them.
      answer: what a vote counts, None if there is none.
    """

    verdict: str
    reason: str = ""
    seconds: float = 0.0
    weak: bool = False
    answer: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it is a pass."""
        return self.verdict == "pass"


@dataclasses.dataclass(frozen=True)
class Grading:
    """How programs are run.

    Attributes:
      limits: of the sandbox; languages that need more take more.
      package_folders: where further packages lie (node_modules, Perl modules, site-packages).
      num_workers: programs at a time; None lets the sandbox choose.
      allow_code_execution: must be True for tasks that run programs.
    """

    limits: Limits = Limits()
    package_folders: tuple[str, ...] = ()
    num_workers: int | None = None
    allow_code_execution: bool = False


Grader = Callable[[Sequence[tuple[Item, str]], Grading], list[Grade]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark: where it lies, how it is asked, how an answer is found and judged.

    Attributes:
      name: as in --task.
      source: the hub's "owner/name" or "owner/name:config", with "#split" unless it is "test".
      fields: alternatives of fields that a row must have, the first that fits is taken.
      make: a row, its number and where it stands to an item.
      forms: prompt forms by name, the first is the default.
      extract: (item, form, completion) to what is graded.
      grade: what was extracted, to verdicts.
      executes: whether grading runs programs.
      checked: "real" if the reader and grader were run on the real set, else "format only".
      shots: where solved problems are taken from, as `source`; "" takes others of the same set.
    """

    name: str
    source: str
    fields: tuple[tuple[str, ...], ...]
    make: Callable[[Mapping[str, Any], int, str], Item]
    forms: Mapping[str, Callable[[Item], Prompt]]
    extract: Callable[[Item, str, str], str]
    grade: Grader
    executes: bool
    checked: str = "real"
    shots: str = ""

    def form(self, name: str | None) -> str:
        """The form's name, the first where None is given; InputError for one that is not there."""
        if name is None:
            return next(iter(self.forms))
        if name not in self.forms:
            known = ", ".join(self.forms)
            raise InputError(f"task {self.name} has no prompt form {name!r}: choose from {known}")
        return name


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(places)] if places else text


def text_id(row: Mapping[str, Any], number: int, prefix: str) -> str:
    """The row's own id as a text, else its place in the file."""
    for name in ("task_id", "id", "unique_id", "problem_id"):
        if row.get(name) is not None:
            return str(row[name])
    return f"{prefix}/{number}"
