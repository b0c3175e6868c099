"""Samples on disk: one JSON record a line, written whole, read back strictly."""

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


def read_samples(
    path: Path, task_ids: Collection[str], *, partial: bool = False
) -> list[dict[str, Any]]:
    """Reads records of at least "id" and "completion" (text), in the order of the file.

    Where "sample" is missing, the answers to one task are numbered in their order; `partial` allows
    tasks without an answer.

    Raises:
      InputError: no such file, broken JSON, a missing field, a task that is not there, one sample
        twice, a task without samples.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; --samples takes a JSONL file")
    records, seen = [], Counter[str]()
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.strip():
            record = _record(line, f"{path}, line {number}", task_ids)
            record.setdefault("sample", seen[record["id"]])
            seen[record["id"]] += 1
            records.append(record)
    twice = [key for key, n in Counter((r["id"], r["sample"]) for r in records).items() if n > 1]
    if twice:
        raise InputError(f"{path}: sample {twice[0][1]} of task {twice[0][0]!r} is there twice")
    missing = [name for name in task_ids if not seen[name]]
    if missing and not partial:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(
            f"{path} has no sample for {len(missing)} of {len(task_ids)} tasks: {names}"
        )
    return records


def _record(line: str, where: str, task_ids: Collection[str]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: an object is needed, got {type(record).__name__}")
    for field in ("id", "completion"):
        if not isinstance(record.get(field), str):
            raise InputError(f"{where}: the text field {field!r} is missing")
    if record["id"] not in task_ids:
        raise InputError(f"{where}: there is no task {record['id']!r} among the {len(task_ids)}")
    return record
