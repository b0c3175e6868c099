"""Rows of a file or data set in order, a share of them, or one again: what sources read through.

Several processes each take a share: of a plain .jsonl file a range of its bytes, of Parquet and of
a data set of `datasets` a range of rows. A .jsonl.gz can only be read from its beginning, so every
process reads it whole.
"""

from __future__ import annotations

import bisect
import functools
import gzip
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from moejax.core.errors import InputError

FILE_TYPES = (".jsonl", ".jsonl.gz", ".parquet")


class Rows(Protocol):
    """Rows with keys: integers that grow along the source."""

    def share(self, index: int, count: int) -> Iterator[tuple[int, Any]]:
        """(key, row) of the share `index` of `count`; all shares in turn are all rows in order."""

    def read(self, key: int) -> Any:
        """A row again."""

    def name(self, key: int) -> str:
        """What to call a row."""

    def where(self, key: int) -> str:
        """File and line, or number, of a row (of JSON lines: a pass over what stands before)."""

    def named(self) -> Iterator[tuple[str, Any]]:
        """(where, row) of all, in order."""


def open_rows(source: str, split: str = "train", limit: int | None = None) -> Rows:
    """The rows of a .jsonl, .jsonl.gz or .parquet file, of a folder of such files, or of a hub
    data set (`owner/name` or `owner/name:subset`), no more than `limit`.

    InputError for an unknown file type, a place that is none, a data set that cannot be loaded.
    """
    path = Path(source)
    if path.is_file():
        if source.endswith(".jsonl"):
            return _JsonLines(path, limit)
        if source.endswith(".jsonl.gz"):
            return _Whole(_compressed_lines(path), limit)
        if source.endswith(".parquet"):
            return _Parquet(path, limit)
        raise InputError(f"{source}: unknown file type; known are {', '.join(FILE_TYPES)}")
    if path.is_dir():
        if not any(path.rglob("*.jsonl")) and not any(path.rglob("*.parquet")):
            raise InputError(
                f"{source} is a folder without .jsonl or .parquet files; give one with some, a "
                f"{' or '.join(FILE_TYPES)} file or a hub data set owner/name"
            )
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        raise InputError(
            f"{source} does not exist; give a {' or '.join(FILE_TYPES)} file or a hub data set "
            "owner/name"
        )
    return _DataSet(source, split, limit)


class Listed:
    """Rows that are in memory, with their names."""

    def __init__(self, values: Sequence[Any], names: Sequence[str]):
        self._values, self._names = values, names

    def share(self, index: int, count: int) -> Iterator[tuple[int, Any]]:
        for key in part_of(len(self._values), index, count):
            yield key, self._values[key]

    def read(self, key: int) -> Any:
        return self._values[key]

    def where(self, key: int) -> str:
        return self._names[key]

    name = where

    def named(self) -> Iterator[tuple[str, Any]]:
        return zip(self._names, self._values, strict=True)


def part_of(total: int, index: int, count: int) -> range:
    """The share `index` of `count` of a range, as even as can be."""
    return range(total * index // count, total * (index + 1) // count)


class _JsonLines:
    """Keys are the offsets of lines."""

    def __init__(self, path: Path, limit: int | None):
        self._path = path
        self._end = path.stat().st_size if limit is None else self._end_of(limit)

    def share(self, index: int, count: int) -> Iterator[tuple[int, Any]]:
        for key, _, line in self._lines(part_of(self._end, index, count)):
            yield key, self._parsed(line, key)

    def read(self, key: int) -> Any:
        for *_, line in self._lines(range(key, key + 1)):
            return self._parsed(line, key)
        raise InputError(
            f"{self._path} has no line at byte {key} any more: bring the file back that this run "
            "began with and start the same command again"
        )

    def name(self, key: int) -> str:
        return f"{self._path}@{key}"

    def where(self, key: int) -> str:
        before = next((number for at, number, _ in self._lines(range(key + 1)) if at == key), 0)
        return f"{self._path}:{before}"

    def named(self) -> Iterator[tuple[str, Any]]:
        for key, number, line in self._lines(range(self._end)):
            yield f"{self._path}:{number}", self._parsed(line, key)

    def _lines(self, part: range) -> Iterator[tuple[int, int, bytes]]:
        """(offset, number, line) of lines that begin in a range of bytes; blank ones count too."""
        with self._path.open("rb") as file:
            if part.start:
                file.seek(part.start - 1)
                file.readline()
            number, key = 1, file.tell()
            while key < part.stop and (line := file.readline()):
                if line.strip():
                    yield key, number, line
                number, key = number + 1, key + len(line)

    def _end_of(self, limit: int) -> int:
        with self._path.open("rb") as file:
            while limit and (line := file.readline()):
                limit -= bool(line.strip())
            return file.tell()

    def _parsed(self, line: bytes, key: int) -> Any:
        try:
            return json.loads(line.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise InputError(f"{self.where(key)}: broken JSON: {reason}; fix this line") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{self.where(key)}: not UTF-8 ({error.reason}); recode it") from error


class _Whole(Listed):
    """Rows that can only be read from the beginning."""

    def __init__(self, found: Iterator[tuple[str, Any]], limit: int | None):
        kept = [row for row, _ in zip(found, range(limit), strict=False)] if limit else list(found)
        super().__init__([row for _, row in kept], [where for where, _ in kept])


def _compressed_lines(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with gzip.open(path) as lines:
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


class _Numbered:
    """Rows by number, named from 1."""

    def __init__(self, name: str, total: int, limit: int | None):
        self._name, self._total = name, total if limit is None else min(limit, total)

    def share(self, index: int, count: int) -> Iterator[tuple[int, Any]]:
        for key in part_of(self._total, index, count):
            yield key, self.read(key)

    def read(self, key: int) -> Any:
        raise NotImplementedError

    def where(self, key: int) -> str:
        return f"{self._name}:{key + 1}"

    name = where

    def named(self) -> Iterator[tuple[str, Any]]:
        return ((self.where(key), row) for key, row in self.share(0, 1))


class _Parquet(_Numbered):
    """Row groups are read as they are needed; the last few are kept."""

    def __init__(self, path: Path, limit: int | None):
        self._path = path
        sizes = self._asked(lambda file: [file.metadata.row_group(i).num_rows for i in _all(file)])
        self._starts = [0, *itertools.accumulate(sizes)]
        super().__init__(str(path), self._starts[-1], limit)
        self._group = functools.lru_cache(maxsize=4)(self._read_group)

    def read(self, key: int) -> Any:
        group = bisect.bisect_right(self._starts, key) - 1
        return self._group(group).slice(key - self._starts[group], 1).to_pylist()[0]

    def _read_group(self, group: int) -> Any:
        return self._asked(lambda file: file.read_row_group(group))

    def _asked(self, question) -> Any:
        from pyarrow import ArrowInvalid, parquet  # comes with `datasets`; slow to import

        try:
            with parquet.ParquetFile(self._path) as file:
                return question(file)
        except (ArrowInvalid, OSError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self._path} is no readable parquet file ({reason}); copy it again"
            ) from error


def _all(file: Any) -> range:
    return range(file.metadata.num_row_groups)


class _DataSet(_Numbered):
    """A data set of `datasets`, from the hub or a folder; its rows are mapped from its cache."""

    def __init__(self, name: str, split: str, limit: int | None):
        import datasets  # slow to import, and only this needs it

        folder = os.path.isdir(name)
        place, _, subset = (name, "", "") if folder else name.partition(":")
        try:
            self._loaded = datasets.load_dataset(place, subset or None, split=split)
        except (
            OSError,
            ValueError,
            StopIteration,
            datasets.exceptions.DatasetGenerationError,
        ) as error:
            reason = " ".join(str(error).split())
            what = "the folder" if folder else f"no file {name}, and the hub data set"
            raise InputError(
                f"{what} {name} (split {split!r}) could not be loaded: {reason}"
            ) from error
        super().__init__(f"{name}[{split}]", len(self._loaded), limit)

    def read(self, key: int) -> Any:
        return self._loaded[key]
