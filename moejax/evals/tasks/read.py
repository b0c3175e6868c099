"""Items of a task from a file or the hub, every broken row named before anything is run."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
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


def with_shots(
    task: Task, items: Sequence[Item], num_shots: int, data: str | None = None, seed: int = 0
) -> list[Item]:
    """Shows `num_shots` solved problems before each item, drawn anew for each by `seed`.

    They come from `data`, else from the task's own source of shots, else from the other items. An
    item is never shown to itself: a solved problem with the same text is passed over.

    Raises:
      InputError: too few problems to draw from.
    """
    if not num_shots:
        return list(items)
    source = data or task.shots
    pool = load_items(task, source) if source else list(items)
    if len(pool) <= num_shots:
        raise InputError(f"--shots={num_shots} needs more than {len(pool)} problems to draw from")
    shown = []
    for number, item in enumerate(items):
        drawn = random.Random(f"{seed}/{number}").sample(pool, num_shots + 1)
        shots = [shot for shot in drawn if _text(shot) != _text(item)][:num_shots]
        shown.append(dataclasses.replace(item, shots=tuple(shots)))
    return shown


def _text(item: Item) -> str:
    kept = {name: value for name, value in item.row.items() if name not in ("id", "task_id")}
    return repr(kept)


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
