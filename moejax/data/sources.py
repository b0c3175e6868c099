"""Conversations from a file or the Hugging Face hub: JSON lines, parquet, a data set's name.

A row is one of
    {"messages": [{"role": ..., "content": ...}, ...]}
    a question and an answer, under one of the pairs of names in FIELD_PAIRS
    (an Alpaca row's "input", where there is one, is put below its instruction).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moejax.core.errors import InputError
from moejax.data.examples import Record, pair
from moejax.data.rows import open_rows

FIELD_PAIRS = (
    ("instruction", "response"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)


def load_records(source: str, split: str = "train", limit: int | None = None) -> list[Record]:
    """All conversations of a file, of a folder of such, or of a data set on the hub, in order.

    On the hub: `owner/name`, or `owner/name:subset` where it has several. `split` chooses among its
    parts; `limit` stops after that many rows. InputError names file and line of a broken row, a
    missing field, an empty source and an unknown file type.
    """
    named = open_rows(source, split, limit).named()
    records = [record_from_row(row, where) for where, row in named]
    if not records:
        raise InputError(f"{source} holds no rows; give a file with at least one example")
    return records


def split_heldout(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """(training, held out), as `is_heldout` decides."""
    train: list[Record] = []
    heldout: list[Record] = []
    for record in records:
        (heldout if is_heldout(record, share) else train).append(record)
    return train, heldout


def is_heldout(record: Record, share: float) -> bool:
    """The hash of everything before the last answer decides.

    So rows with the same question fall on the same side, in whatever order the file is.
    """
    question = json.dumps([dict(m) for m in record.messages[:-1]], sort_keys=True)
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def record_from_row(row: Any, where: str) -> Record:
    """One row as a conversation; `where` (file and line) becomes its id and stands in errors."""
    if not isinstance(row, Mapping):
        raise InputError(
            f"{where}: a {type(row).__name__}, not an object; write one JSON object per line"
        )
    if row.get("messages") is not None:
        return _conversation(row["messages"], where)
    if row.get("conversations") is not None:
        return _conversation(_shared_gpt(row, where), where)
    for question, answer in FIELD_PAIRS:
        if row.get(question) is not None and row.get(answer) is not None:
            texts = [_text(row, question, where), _text(row, answer, where)]
            if row.get("input"):
                texts[0] += "\n\n" + _text(row, "input", where)
            return pair(where, texts[0], texts[1])
    known = ", ".join("/".join(names) for names in FIELD_PAIRS)
    raise InputError(
        f"{where}: has the fields {', '.join(map(str, row)) or '(none)'}, but needs messages, "
        f"conversations or one of {known}; rename them"
    )


def _shared_gpt(row: Mapping[str, Any], where: str) -> Any:
    """The form of ShareGPT, and of Bespoke-Stratos-17k: [{"from", "value"}], perhaps "system"."""
    found = row["conversations"]
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise InputError(f"{where}: conversations is a {type(found).__name__}, not a list")
    names: dict[Any, Any] = {"human": "user", "gpt": "assistant"}
    start = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return start + [
        {"role": names.get(m.get("from"), m.get("from")), "content": m.get("value")}
        if isinstance(m, Mapping)
        else m
        for m in found
    ]


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
    """Every row of a file or data set with the place where it stands; InputError as above."""
    return open_rows(source, split).named()
