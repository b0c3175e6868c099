"""Conversations from a file or the Hugging Face hub: JSON lines, parquet, a data set's name.

A row is one of
    {"messages": [{"role": ..., "content": ...}, ...]}
    a question and an answer, under one of the pairs of names in FIELD_PAIRS
    (an Alpaca row's "input", where there is one, is put below its instruction).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.core.errors import InputError
from moejax.data.examples import Record, pair

FIELD_PAIRS = (
    ("instruction", "response"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
FILE_TYPES = (".jsonl", ".jsonl.gz", ".parquet")


def load_records(source: str, split: str = "train", limit: int | None = None) -> list[Record]:
    """All conversations of a file, or of a data set on the hub, in order.

    On the hub: `owner/name`, or `owner/name:subset` where it has several. `split` chooses among its
    parts; `limit` stops after that many rows. InputError names file and line of a broken row, a
    missing field, an empty source and an unknown file type.
    """
    records: list[Record] = []
    for where, row in rows(source, split):
        if limit is not None and len(records) >= limit:
            break
        records.append(record_from_row(row, where))
    if not records:
        raise InputError(f"{source} holds no rows; give a file with at least one example")
    return records


def split_heldout(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """(training, held out): the hash of everything before the last answer decides.

    So rows with the same question fall on the same side, in whatever order the file is.
    """
    train: list[Record] = []
    heldout: list[Record] = []
    for record in records:
        question = json.dumps([dict(m) for m in record.messages[:-1]], sort_keys=True)
        digest = hashlib.sha256(question.encode()).digest()
        side = heldout if int.from_bytes(digest[:8], "big") / 2**64 < share else train
        side.append(record)
    return train, heldout


def record_from_row(row: Any, where: str) -> Record:
    """One row as a conversation; `where` (file and line) becomes its id and stands in errors."""
    if not isinstance(row, Mapping):
        raise InputError(
            f"{where}: a {type(row).__name__}, not an object; write one JSON object per line"
        )
    if row.get("messages") is not None:
        return _conversation(row["messages"], where)
    for question, answer in FIELD_PAIRS:
        if row.get(question) is not None and row.get(answer) is not None:
            texts = [_text(row, question, where), _text(row, answer, where)]
            if row.get("input"):
                texts[0] += "\n\n" + _text(row, "input", where)
            return pair(where, texts[0], texts[1])
    known = ", ".join("/".join(names) for names in FIELD_PAIRS)
    raise InputError(
        f"{where}: has the fields {', '.join(map(str, row)) or '(none)'}, but needs messages or "
        f"one of {known}; rename them"
    )


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        kind = "blank" if isinstance(value, str) else f"a {type(value).__name__}"
        raise InputError(f"{where}: field {name!r} is {kind}, not a text; fix or drop this row")
    return value


def _conversation(messages: Any, where: str) -> Record:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f"{where}: messages is a {type(messages).__name__}, not a list")
    made = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"{where}: message {i} is a {type(message).__name__}, not an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                kind = type(message.get(key)).__name__
                raise InputError(f"{where}: message {i}: {key!r} must be a text, not {kind}")
        made.append({"role": message["role"], "content": message["content"]})
    if not any(m["role"] == "assistant" and m["content"].strip() for m in made):
        roles = ", ".join(m["role"] for m in made) or "none"
        raise InputError(
            f"{where}: no assistant message with content (roles: {roles}), so nothing to learn"
        )
    return Record(where, tuple(made))


def rows(source: str, split: str = "train") -> Iterator[tuple[str, Any]]:
    """Every row of a file or hub data set with the place where it stands; InputError as above."""
    path = Path(source)
    if path.is_file():
        if source.endswith((".jsonl", ".jsonl.gz")):
            return _json_lines(path)
        if source.endswith(".parquet"):
            return _parquet(path)
        raise InputError(f"{source}: unknown file type; known are {', '.join(FILE_TYPES)}")
    if path.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(
            f"{source} {kind}; give a {' or '.join(FILE_TYPES)} file or a hub data set owner/name"
        )
    return _hub(source, split)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig").strip()
                if text:
                    yield f"{path}:{number}", json.loads(text)
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise InputError(f"{path}:{number}: broken JSON: {reason}; fix this line") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}:{number}: not UTF-8 ({error.reason}); recode it") from error
        except (gzip.BadGzipFile, EOFError) as error:
            raise InputError(
                f"{path}: after line {number}: {error}; the archive is damaged, copy it again"
            ) from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowInvalid, parquet  # comes with `datasets`; slow to import

    try:
        with parquet.ParquetFile(path) as table:
            number = 0
            for part in table.iter_batches():
                for row in part.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no readable parquet file ({reason}); copy it again") from error


def _hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    import datasets  # slow to import, and only this needs it

    place, _, subset = name.partition(":")
    try:
        loaded = datasets.load_dataset(place, subset or None, split=split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"no file {name}, and the hub data set {name} (split {split!r}) could not be "
            f"loaded: {reason}"
        ) from error
    for number, row in enumerate(loaded, start=1):
        yield f"{name}[{split}]:{number}", row
