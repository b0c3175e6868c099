"""Items of a task from a file or the hub, every broken row named before anything is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from moejax.core.errors import InputError
from moejax.data.sources import rows
from moejax.evals.tasks.base import Item, Task


def load_items(task: Task, data: str | None = None, limit: int | None = None) -> list[Item]:
    """Reads the items of `task` from `data` (.jsonl, .jsonl.gz, .parquet, a hub name) or its hub.

    Raises:
      InputError: no such source, broken JSON, a row without the fields of any known form of the
        set, the same id twice, no rows.
    """
    name, _, split = (data or task.source).partition("#")
    if not name:
        raise InputError(f"task {task.name} has no set of its own: give --data=FILE.jsonl")
    items: list[Item] = []
    for number, (where, row) in enumerate(rows(name, split or "test")):
        if limit is not None and len(items) >= limit:
            break
        items.append(task.make(_checked(task, row, where), number, where))
    if not items:
        raise InputError(f"{name} is empty: one problem per line is needed")
    twice = [key for key, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise InputError(
            f"{name}: {len(twice)} ids are there more than once, as {twice[0]!r}; ids must differ"
        )
    return items


def _checked(task: Task, row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: an object is needed, got {type(row).__name__}")
    missing = [[name for name in fields if row.get(name) is None] for fields in task.fields]
    if all(missing):
        nearest = min(missing, key=len)
        forms = " or ".join("(" + ", ".join(fields) + ")" for fields in task.fields)
        raise InputError(
            f"{where}: not a problem of {task.name}: {', '.join(map(repr, nearest))} missing; "
            f"a row has {forms}"
        )
    return row
