"""Samples on disk: one JSON record a line, appended while a run goes on, read back strictly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from moejax.core.errors import InputError
from moejax.io.atomic import write_text


def write_samples(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the file by these records, one JSON object a line."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def append_samples(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds records to a file that a run is still writing; `read_partial` mends what a kill left."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def read_partial(path: Path) -> list[dict[str, Any]]:
    """Records of a run that may have been killed while it wrote: whole lines only."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text("utf-8", errors="replace").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def read_samples(
    path: Path, task_ids: Collection[str], *, partial: bool = False
) -> list[dict[str, Any]]:
    """Reads records of at least "id" (or "task_id") and a "completion" or "solution", in order.

    A completion continues the prompt or is a reply; a solution is a whole program (EvalPlus). Where
    "sample" is missing, the answers to one task are numbered in their order; `partial` allows tasks
    without an answer.

    Raises:
      InputError: no such file, broken JSON, a missing field, a task that is not there, one sample
        twice, a task without samples.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; --samples takes a JSONL file")
    records, seen, known = [], Counter[str](), set(task_ids)
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason}); recode it") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            record = _record(line, f"{path}, line {number}", known)
            record.setdefault("sample", seen[record["id"]])
            seen[record["id"]] += 1
            records.append(record)
    twice = [key for key, n in Counter((r["id"], r["sample"]) for r in records).items() if n > 1]
    if twice:
        raise InputError(
            f"{path}: sample {twice[0][1]} of task {twice[0][0]!r} is there twice"
            + (f", and {len(twice) - 1} more" if len(twice) > 1 else "")
        )
    missing = [name for name in task_ids if not seen[name]]
    if missing and not partial:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(
            f"{path} has no sample for {len(missing)} of {len(task_ids)} tasks: {names}; "
            "add them, or pass --partial to score the others alone"
        )
    if not records:
        raise InputError(f"{path} is empty: one sample per line is needed")
    return records


def _record(line: str, where: str, task_ids: Collection[str]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: an object is needed, got {type(record).__name__}")
    if "id" not in record and "task_id" in record:
        record["id"] = record.pop("task_id")
    if isinstance(record.get("id"), int):
        record["id"] = str(record["id"])
    if not isinstance(record.get("id"), str):
        raise InputError(f"{where}: the text field 'id' is missing ('task_id' will do)")
    if not any(isinstance(record.get(name), str) for name in ("completion", "solution")):
        raise InputError(f"{where}: the text field 'completion' (or 'solution') is missing")
    if record["id"] not in task_ids:
        raise InputError(f"{where}: there is no task {record['id']!r} among the {len(task_ids)}")
    return record
