"""Importance of every head and neuron of many texts on disk, in few bytes, and pooled exactly.

The reference keeps float32 arrays of every criterion, 700 GB in all. Here a head's score is float32
and a neuron's one byte: its sign and 127 levels of its size, an eighth of an octave apart, relative
to the largest of its layer (error at most 4.4 %; below 2^-15.75 of the largest it is 0).

folder/part_00000.npz  of consecutive texts: "text" (which), "context" [N, E], "loss" [N], per
                       criterion "heads/NAME" float32 [N, L, H], "neurons/NAME" int8 [N, L, F] and
                       "largest/NAME" float32 [N, L]; of R tokens per text what
                       `moejax.methods.shadow_dejavu` learns from: "rows/attn_in" and "rows/mlp_in"
                       float16 [N, L, R, D], and labels, 8 of them a byte: "rows/heads",
                       "rows/neurons" uint8; and "rows/context" float16 [N, R, E] of the same
                       token, from which the unified predictor learns the same labels
folder/pooled_00000.npz  of the same texts: float64 sums of the unrounded scores of every criterion
                       and how many texts had it, held-out texts apart
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.core.errors import InputError
from moejax.io import atomic
from moejax.methods.shadow_dejavu import labels

# 2: "rows/context" is of the row's own token; in 1 it was of the one before.
FORMAT = 2
_LEVELS, _PER_OCTAVE = 127, 8


def encode(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 codes, float32 largest size of each row of the last dim). Inverse: `decode`.

    InputError for values that are not finite.
    """
    values = np.asarray(values, np.float32)
    if not np.isfinite(values).all():
        bad = np.argwhere(~np.isfinite(values))[0].tolist()
        raise InputError(f"a score is NaN or infinite, the first at {bad}: it cannot be kept")
    largest = np.abs(values).max(-1)
    with np.errstate(divide="ignore"):
        octaves = np.log2(np.abs(values) / np.where(largest > 0, largest, 1)[..., None])
    level = np.clip(np.round(_LEVELS + _PER_OCTAVE * octaves), 0, _LEVELS)
    return (np.sign(values) * level).astype(np.int8), largest


def decode(codes: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """float32 values of `encode`'s codes."""
    table = np.exp2((np.arange(_LEVELS + 1) - _LEVELS) / _PER_OCTAVE).astype(np.float32)
    table[0] = 0
    signed = np.concatenate([table, -table[:0:-1]])  # code c of -127..127 at index c
    return signed[codes] * np.asarray(largest, np.float32)[..., None]


def pack(
    found: Sequence[dict[str, Any]], texts: Sequence[int], fires: bool = False
) -> dict[str, np.ndarray]:
    """Arrays of a part from what `shadow_measure.measure` gave for some texts.

    fires: whether neurons are exactly 0 where they do not fire (`shadow_dejavu.labels`).
    """
    arrays: dict[str, np.ndarray] = {
        "text": np.array(texts, np.int32),
        "context": np.stack([f["context"] for f in found]).astype(np.float32),
        "loss": np.array([f["loss"] for f in found], np.float32),
    }
    for name in found[0]["heads"]:
        heads = np.stack([f["heads"][name] for f in found]).astype(np.float32)
        if not np.isfinite(heads).all():
            raise InputError(f"criterion {name} of heads is NaN or infinite for a text")
        arrays[f"heads/{name}"] = heads
    for name in found[0]["neurons"]:
        both = encode(np.stack([f["neurons"][name] for f in found]))
        arrays[f"neurons/{name}"], arrays[f"largest/{name}"] = both
    if "rows" in found[0]:
        rows = {n: np.stack([f["rows"][n] for f in found]) for n in found[0]["rows"]}
        for name in ("attn_in", "mlp_in", "context"):
            arrays[f"rows/{name}"] = rows[name].astype(np.float16)
        for name, zeros in (("heads", False), ("neurons", fires)):
            arrays[f"rows/{name}"] = np.packbits(labels(rows[name], zeros), axis=-1)
    return arrays


def part_path(folder: str | os.PathLike[str], number: int) -> Path:
    """The file of a part."""
    return Path(folder) / f"part_{number:05d}.npz"


def write_part(folder: str | os.PathLike[str], number: int, arrays: dict[str, np.ndarray]) -> int:
    """Writes a part, whole or not at all; returns its bytes."""
    path = part_path(folder, number)
    atomic.write_npz(path, arrays)
    return path.stat().st_size


def read_parts(folder: str | os.PathLike[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    """These arrays of all parts, joined over texts; InputError if there is none of a name, and for
    NaN or infinity in one."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for part in parts(folder):
        for name, array in atomic.read_npz(part, names.__contains__).items():
            found[name].append(_finite(array, part, name))
    for name, pieces in found.items():
        if not pieces:
            raise InputError(f"{folder} has no {name}: collect it (collect.criteria)")
    return {name: np.concatenate(pieces) for name, pieces in found.items()}


def _finite(array: np.ndarray, path: Path, name: str) -> np.ndarray:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))[0].tolist()
        raise InputError(
            f"{path}: NaN or infinity in {name}, the first at {bad}: remove the file and run "
            "--stage=collect"
        )
    return array


def parts(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Files of a folder's parts, first to last."""
    return iter(sorted(Path(folder).glob("part_*.npz")))


def row_labels(folder: str | os.PathLike[str], part: str, count: int) -> np.ndarray:
    """bool [N, L, R, count] of all texts: DejaVu's labels of "heads" or "neurons"."""
    packed = read_parts(folder, [f"rows/{part}"])[f"rows/{part}"]
    return np.unpackbits(packed, axis=-1, count=count).view(bool)


def neurons(folder: str | os.PathLike[str], criterion: str) -> np.ndarray:
    """float32 [N, L, F] of all texts."""
    names = (f"neurons/{criterion}", f"largest/{criterion}")
    arrays = read_parts(folder, names)
    return decode(*(arrays[name] for name in names))


class Pooled:
    """Running sums of scores, each text counted once: the static scores."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, int] = {}

    def add(self, found: dict[str, Any]) -> None:
        """Adds one text."""
        for place in ("heads", "neurons"):
            for name, values in found[place].items():
                key, values = f"{place}/{name}", np.asarray(values, np.float64)
                self.sums[key] = self.sums.get(key, 0.0) + values
                self.counts[key] = self.counts.get(key, 0) + 1

    def merge(self, other: Pooled) -> None:
        """Adds all texts of another."""
        for key, values in other.sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + values
            self.counts[key] = self.counts.get(key, 0) + other.counts[key]

    def mean(self, key: str) -> np.ndarray:
        """The mean of one place and criterion, as "heads/plainact"."""
        if key not in self.sums:
            raise InputError(f"{key} was not collected: there are {', '.join(sorted(self.sums))}")
        return self.sums[key] / self.counts[key]

    def arrays(self) -> dict[str, np.ndarray]:
        """For a file; inverse: `of_arrays`."""
        counts = {f"count/{key}": np.array(count) for key, count in self.counts.items()}
        return {f"sum/{key}": values for key, values in self.sums.items()} | counts

    @classmethod
    def of_arrays(cls, arrays: Any) -> Pooled:
        """From what `arrays` gave."""
        pooled = cls()
        for name in arrays:
            if name.startswith("sum/"):
                key = name.removeprefix("sum/")
                pooled.sums[key] = arrays[name]
                pooled.counts[key] = int(arrays[f"count/{key}"])
        return pooled
