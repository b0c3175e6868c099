"""Tensors by name: the protocol every weight file is read through, and safetensors both ways."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import safetensors

from moejax.core.errors import InputError
from moejax.io import atomic, host
from moejax.io.digests import Digests

_log = logging.getLogger(__name__)

_FLUSH_BYTES = 64 << 20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Names in the file format of the types a model may have; every other type is refused by name.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def dtype_named(name: str) -> np.dtype:
    """The dtype called "float32", "bfloat16", ...; InputError lists the names that are known."""
    for dtype in _CODES:
        if dtype.name == name:
            return dtype
    known = ", ".join(dtype.name for dtype in _CODES)
    raise InputError(f"dtype {name!r} is unknown: use keep or one of {known}")


class Info(NamedTuple):
    """Shape and dtype of a tensor that is not in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype


# First and last but one of consecutive rows, or columns; None is all of them.
Range = tuple[int, int] | None


class TensorSource(Protocol):
    """Named tensors: what they are at once, what they hold in pieces of the caller's size."""

    @property
    def infos(self) -> Mapping[str, Info]:
        """Shape and dtype of every tensor."""
        ...

    def read(self, name: str, rows: Range = None, columns: Range = None) -> np.ndarray:
        """Returns one tensor, or these rows and columns of it (of a vector: rows only)."""
        ...


class SafetensorsFolder:
    """The safetensors files of a model folder, sharded (by its index) or single, or `files` of it.

    Errors: InputError for a missing or truncated shard, an index that does not fit, an integer
    or quantised dtype.
    """

    def __init__(self, folder: str | os.PathLike[str], files: Iterable[Path] | None = None):
        folder = Path(folder)
        self.infos: dict[str, Info] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for path in _shards(folder) if files is None else files:
            for name, (info, offset) in _read_header(path).items():
                if name in self.infos:
                    raise InputError(f"tensor {name} is in two shards of {folder}")
                self.infos[name] = info
                self._places[name] = (path, offset)
        size = sum(math.prod(i.shape) * i.dtype.itemsize for i in self.infos.values())
        if files is None:
            _check_index(folder, self._places, size)
        self.digests: Digests | None = None

    def hash_reads(self) -> Digests:
        """From now on what is read is hashed too; returns the hashes."""
        self.digests = self.digests or Digests()
        return self.digests

    def read(self, name: str, rows: Range = None, columns: Range = None) -> np.ndarray:
        """Returns one tensor, or these rows and columns; no other byte of it is read."""
        (path, offset), info = self._places[name], self.infos[name]
        if not info.shape:
            rows = columns = None
        first, last = rows or (0, info.shape[0] if info.shape else 1)
        row_size = math.prod(info.shape[1:]) * info.dtype.itemsize
        start = offset + first * row_size
        shape = (last - first, *info.shape[1:]) if info.shape else ()
        # Read, not mapped: pages of a mapped file count as this process's memory.
        with open(path, "rb", buffering=0) as file:
            if columns in (None, (0, info.shape[-1] if info.shape else 1)):
                value = host.empty(shape, info.dtype)
                _fill(file, value, start, name)
                if self.digests is not None:
                    self.digests.saw(path, start, value.reshape(-1).view(np.uint8))
                return value
            left, right = columns
            value = host.empty((last - first, right - left), info.dtype)
            for number, row in enumerate(value):
                _fill(file, row, start + number * row_size + left * info.dtype.itemsize, name)
        return value


def _fill(file, value: np.ndarray, offset: int, name: str) -> None:
    """Reads an array's bytes from `offset` on; a shard that shrank meanwhile is an InputError."""
    file.seek(offset)
    view = memoryview(value.reshape(-1).view(np.uint8).data)
    while view.nbytes:
        num_read = file.readinto(view)
        if not num_read:
            raise InputError(f"{file.name} ends {view.nbytes} bytes too early for tensor {name}")
        view = view[num_read:]


def _shards(folder: Path) -> list[Path]:
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}")
        return [folder / SINGLE]
    names = sorted(set(_weight_map(folder).values()))
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder / INDEX} names {name}, which is missing: fetch that shard")
    return [folder / name for name in names]


def _weight_map(folder: Path) -> dict[str, str]:
    index = atomic.read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX} has no weight_map: fetch the file again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{folder / INDEX} names {name!r}, which is not a file of its folder")
    return weight_map


def _check_index(folder: Path, places: Mapping[str, tuple[Path, int]], size: int) -> None:
    """Raises InputError unless the index says where each tensor is; warns of a wrong size of all.

    Released indices have it wrong: Llama-2-7b-hf's counts float32 bytes of float16 tensors.
    """
    path = folder / INDEX
    if not path.exists():
        return
    for name, file in _weight_map(folder).items():
        if name not in places:
            raise InputError(f"{path} names tensor {name}, which no shard holds")
        if places[name][0].name != file:
            raise InputError(
                f"{path} says that tensor {name} is in {file}, but {places[name][0].name} holds it"
            )
    unnamed = sorted(places.keys() - _weight_map(folder).keys())
    if unnamed:
        raise InputError(f"{path} does not name tensor {unnamed[0]}, which a shard holds")
    metadata = atomic.read_json(path).get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if said is not None and said != size:
        _log.warning(
            "%s says that all tensors take %s bytes; they take %d, which is used", path, said, size
        )


def _read_header(path: Path) -> dict[str, tuple[Info, int]]:
    """Every tensor of a file and its place, as they lie there; the library checks that they fit."""
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise InputError(
            f"{path} is broken or truncated at {path.stat().st_size} bytes ({error}): "
            "fetch it again"
        ) from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    as_they_lie = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {
        name: (_info(name, tensor, path), 8 + length + tensor["data_offsets"][0])
        for name, tensor in as_they_lie
    }


def _info(name: str, tensor: Mapping[str, Any], path: Path) -> Info:
    code = tensor["dtype"]
    if code not in DTYPES:
        raise InputError(
            f"{path}: tensor {name} is {code}, not one of {', '.join(DTYPES)}: "
            "quantised checkpoints are not read, use the unquantised one"
        )
    return Info(tuple(tensor["shape"]), DTYPES[code])


class Entry(NamedTuple):
    """A tensor to write; `make` gives it, or parts whose bytes in turn are its own, when asked."""

    name: str
    info: Info
    make: Callable[[], np.ndarray | Iterable[np.ndarray]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.info.shape) * self.info.dtype.itemsize

    def parts(self) -> Iterator[np.ndarray]:
        """The tensor's parts; checks that together they are as large as was said."""
        made, size = self.make(), 0
        for part in (made,) if isinstance(made, np.ndarray) else made:
            assert part.dtype == self.info.dtype, (self.name, part.dtype, self.info.dtype)
            size += part.size
            yield part
        assert size == math.prod(self.info.shape), (self.name, size, self.info.shape)


def write_file(
    path: str | os.PathLike[str],
    entries: Iterable[Entry],
    wrote: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Writes one safetensors file, tensor by tensor, holding one part of one in memory at a time.

    Layout (https://github.com/huggingface/safetensors): u64 length of the header, little endian;
    the header as JSON, padded with spaces to 8 bytes; the tensors' bytes, row major. `wrote` is
    called with the bytes of every part.
    """
    entries = list(entries)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.num_bytes
        header[entry.name] = {
            "dtype": _CODES[entry.info.dtype],
            "shape": list(entry.info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as flusher:
        _write(file, len(text).to_bytes(8, "little") + text)
        unflushed, flushing = 0, None
        made = (host.row_major(part) for entry in entries for part in entry.parts())
        for value in _one_ahead(made):
            _write(file, value.reshape(-1).view(np.uint8).data)
            wrote(value.nbytes)
            unflushed += value.nbytes
            # The disk works while the next parts are made, and not all at the end.
            if unflushed > _FLUSH_BYTES and (flushing is None or flushing.done()):
                flushing = flusher.submit(os.fdatasync, file.fileno())
                unflushed = 0
        if flushing is not None:
            flushing.result()


def _one_ahead(values: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same arrays; a thread makes the next one while the caller works on one."""
    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(next, values, None)
        while (value := coming.result()) is not None:
            coming = maker.submit(next, values, None)
            yield value


def _write(file, content: bytes | memoryview) -> None:
    """Writes all of it: an unbuffered file may take less at a time."""
    view = memoryview(content)
    while view.nbytes:
        view = view[file.write(view) :]


def write_folder(
    folder: str | os.PathLike[str],
    entries: Iterable[Entry],
    max_shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes `model.safetensors`, or shards with an index when it would pass `max_shard_bytes`."""
    folder = Path(folder)
    shards: list[list[Entry]] = [[]]
    size = total = done = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
        total += entry.num_bytes

    def wrote(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], wrote)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard, wrote)
        weight_map.update({entry.name: name for entry in shard})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    atomic.write_json(folder / INDEX, index)
