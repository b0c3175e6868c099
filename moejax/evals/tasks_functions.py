"""The shipped easy tasks: one small Python function each, with hidden tests.

They separate models of about 100 million parameters, which solve next to nothing of HumanEval.
"""

import dataclasses
import json
from importlib import resources
from pathlib import Path
from typing import Any

from moejax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class FunctionTask:
    """A function to write; `tests` are pairs of arguments and the expected result (plain data)."""

    id: str
    name: str
    signature: str
    description: str
    tests: tuple[tuple[list[Any], Any], ...]
    solution: str = ""
    mutant: str = ""


# A form is what the model is asked, and what is put at the start of its answer.
PROMPT_FORMS: dict[str, tuple[str, str]] = {
    "chat": ("Write a Python function {signature} that {description}.", ""),
    "fence": (
        "Write a Python function {signature} that {description}.",
        "```python\ndef {signature}:\n",
    ),
}


def prompt(task: FunctionTask, form: str) -> tuple[str, str]:
    """Returns the user's message for `task`, and the start of the answer given to the model.

    Raises:
      InputError: `form` is not one of PROMPT_FORMS.
    """
    if form not in PROMPT_FORMS:
        raise InputError(f"no prompt form {form!r}: choose from {', '.join(PROMPT_FORMS)}")
    message, prefix = PROMPT_FORMS[form]
    fields = {"signature": task.signature, "description": task.description}
    return message.format(**fields), prefix.format(**fields)


def load_tasks(path: str | None = None) -> list[FunctionTask]:
    """Reads tasks from a JSONL file, or the shipped ones.

    Each line has id, name, signature, description and tests: [{"args": [...], "expected": ...}].

    Raises:
      InputError: a missing file, a broken line, a missing field, or the same id twice.
    """
    if path is None:
        name = "functions.jsonl (shipped)"
        text = (resources.files("moejax.evals") / "tasks" / "functions.jsonl").read_text("utf-8")
    else:
        name = path
        if not Path(path).is_file():
            raise InputError(f"no task file {path}: give a JSONL file or leave --data empty")
        text = Path(path).read_text("utf-8")
    tasks = [_task(line, f"{name}, line {i}") for i, line in enumerate(text.splitlines(), 1)]
    if not tasks:
        raise InputError(f"{name} is empty: one task per line is needed")
    ids = [task.id for task in tasks]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise InputError(f"{name}: the id {twice!r} is there twice; ids must differ")
    return tasks


def _task(line: str, where: str) -> FunctionTask:
    try:
        fields = json.loads(line)
        tests = tuple((test["args"], test["expected"]) for test in fields.pop("tests"))
        task = FunctionTask(tests=tests, **fields)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except (KeyError, TypeError, AttributeError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(FunctionTask))
        raise InputError(f"{where}: not a task ({error}); its fields are {known}") from error
    if not tests:
        raise InputError(f"{where}: task {task.id!r} has 0 tests, at least 1 is needed")
    return task
