"""A user's own task: a JSONL file with "prompt" and "answer", and the name of a grader.

number   the reply's final number equals the answer's
math     math-verify finds them equal
exact    the reply's final answer is the answer, but for case, spaces and a full stop
python   rows as HumanEval's: "prompt", "entry_point", "test"
calls    rows as the shipped functions': "name", "signature", "description", "tests"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.core.errors import InputError
from moejax.evals import answers
from moejax.evals.tasks.answer_tasks import grade_math, grade_numbers, whole
from moejax.evals.tasks.base import Grade, Grading, Item, Prompt, Task, text_id
from moejax.evals.tasks.functions import FUNCTIONS
from moejax.evals.tasks.python_code import HUMANEVAL


def make_item(row: Mapping[str, Any], number: int, where: str) -> Item:
    """A prompt and the answer as a text."""
    if not isinstance(row["prompt"], str):
        raise InputError(f"{where}: 'prompt' is {type(row['prompt']).__name__}, not text")
    fields = {"question": row["prompt"], "gold": str(row["answer"]), "worked": str(row["answer"])}
    return Item(text_id(row, number, "own"), {**row, "exam": fields})


def _number_item(row: Mapping[str, Any], number: int, where: str) -> Item:
    item = make_item(row, number, where)
    gold = answers.final_number(item.row["exam"]["gold"])
    if gold is None:
        raise InputError(f"{where}: 'answer' holds no number: {row['answer']!r}")
    return dataclasses.replace(item, row={**row, "exam": {**item.row["exam"], "gold": gold}})


def chat(item: Item) -> Prompt:
    """The prompt as a user's turn, behind solved ones if there are any."""
    return Prompt(_before(item) + item.row["prompt"], "")


def text(item: Item) -> Prompt:
    """The prompt as plain text to continue, up to the end of the line."""
    return Prompt(None, _before(item) + item.row["prompt"], ("\n",))


def _before(item: Item) -> str:
    solved = (f"{s.row['prompt']} {s.row['exam']['worked']}\n\n" for s in item.shots)
    return "".join(solved)


def grade_exact(pairs: Sequence[tuple[Item, str]], grading: Grading) -> list[Grade]:
    """Compares the reply's final answer, else the whole reply, with the gold one."""
    grades = []
    for item, reply in pairs:
        gold = _folded(item.row["exam"]["gold"])
        marked = answers.marked(reply)
        said = _folded(reply if marked is None else marked)
        if not said:
            grades.append(Grade("no answer", "the reply is empty"))
        elif gold in (said, _folded(reply)):
            grades.append(Grade("pass", answer=gold))
        else:
            grades.append(Grade("wrong", f"{said[:80]!r}, not {gold[:80]!r}", answer=said))
    return grades


def _folded(value: str) -> str:
    return " ".join(value.split()).strip(" .*$").casefold()


_ROWS = (("prompt", "answer"),)
_FORMS = {"chat": chat, "text": text}
_NUMBER = Task("own", "", _ROWS, _number_item, _FORMS, whole, grade_numbers, executes=False)
GRADERS: dict[str, Task] = {
    "number": _NUMBER,
    "math": dataclasses.replace(_NUMBER, make=make_item, grade=grade_math),
    "exact": dataclasses.replace(_NUMBER, make=make_item, grade=grade_exact),
    "python": dataclasses.replace(HUMANEVAL, name="own", source=""),
    "calls": dataclasses.replace(FUNCTIONS, name="own", source=""),
}
