"""GGUF files (llama.cpp's format) read as Hugging Face tensors and a Hugging Face config.

llama.cpp rotates neighbouring channels where Hugging Face rotates the two halves of a head, so its
converter reorders the rows of every query and key head; `stored_rows` says where they went.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type

from moejax.core.errors import InputError
from moejax.io import gguf_rope
from moejax.io.gguf_layout import GgufLayout, Place, layout_of_file, places
from moejax.io.safetensors import Info, Range
from moejax.models.families import by_name

_MAGIC = b"GGUF"
_PLAIN = {
    Type.F32: np.dtype(np.float32),
    Type.F16: np.dtype(np.float16),
    Type.BF16: np.dtype(ml_dtypes.bfloat16),
}
# What gguf's reader raises on a file that ends early or is not what it says.
_BROKEN = (ValueError, IndexError, KeyError, OverflowError, TypeError)


class GgufFile:
    """An open GGUF file: its `metadata`, and config and tensors in Hugging Face's names.

    Tensors are dequantised one at a time as they are read; quantised ones become float32, plain
    ones keep their type.

    Errors: InputError for a file that is missing, truncated, not GGUF or of an architecture that
    is not read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        reader = _open(self.path)
        self.metadata = _contents(reader)
        self.layout = layout_of_file(self.metadata, self.path)
        self.family = by_name(self.layout.family)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        factors = stored.pop(gguf_rope.FACTORS, None)
        self.config = config_of(
            self.metadata,
            stored.keys(),
            self.layout,
            self.path,
            None if factors is None else factors.data,
        )
        model = self.family.config_from_hf(self.config)
        table = self.family.name_table(model)
        self._places = places(self.layout, model, table, stored.keys())
        self._tensors = stored
        self._last: tuple[str, np.ndarray] | None = None
        used = {place.name for parts in self._places.values() for place in parts}
        # A tensor without a place keeps its name, and the importer refuses it.
        self._places |= {name: [Place(name, None)] for name in stored.keys() - used}
        shapes = {weight.hf_name: weight.hf_shape for weight in table}
        self.infos = {
            name: self._info(parts, shapes.get(name))
            for name, parts in self._places.items()
            if all(place.name in stored for place in parts)
        }

    def _info(self, parts: list[Place], wanted: tuple[int, ...] | None) -> Info:
        place, tensor = parts[0], self._tensors[parts[0].name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if place.cut is not None:
            return Info(self._joined_shape(parts), _dtype(tensor))
        if place.expert is not None:
            # Too few experts show as a shape that does not fit.
            shape = shape[1:] if len(shape) == 3 and place.expert < shape[0] else shape
        elif wanted is not None and len(shape) == 1 and wanted == (1, *shape):
            shape = wanted
        return Info(shape, _dtype(tensor))

    def read(self, name: str, rows: Range = None, columns: Range = None) -> np.ndarray:
        """Returns one tensor in Hugging Face's layout, or these rows and columns of it."""
        place, info = self._places[name][0], self.infos[name]
        if place.cut is not None:
            value = self._joined(name)
            value = value if rows is None else value[slice(*rows)]
            return value if columns is None else np.ascontiguousarray(value[:, slice(*columns)])
        tensor = self._tensors[place.name]
        data = tensor.data if place.expert is None else tensor.data[place.expert]
        if len(tensor.shape) > 1:
            first, last = rows or (0, info.shape[0])
            wanted = np.arange(first, last)
            data = data[stored_rows(wanted, place.head_size) if place.head_size else wanted]
            value = self._plain(data, tensor, name).reshape(last - first, *info.shape[1:])
        else:
            value = self._plain(np.array(data), tensor, name).reshape(info.shape)
            if place.head_size:
                value = value[stored_rows(np.arange(len(value)), place.head_size)]
            value = value if rows is None else value[slice(*rows)]
        if place.plus_one:
            value = (value.astype(np.float32) - 1).astype(value.dtype)
        return value if columns is None else np.ascontiguousarray(value[:, slice(*columns)])

    def _joined_shape(self, parts: list[Place]) -> tuple[int, ...]:
        """Shape of a tensor that was cut apart; where parts do not fit, one that fits nothing."""
        heads, widths, inputs = set(), 0, set()
        for place in parts:
            shape = tuple(int(n) for n in reversed(self._tensors[place.name].shape))
            if place.cut is None or len(shape) != 3:
                return shape
            head, rows, columns = (shape[0], *shape[:0:-1]) if place.cut.transposed else shape
            heads.add(head)
            inputs.add(columns)
            widths += rows
        one = len(heads) == len(inputs) == 1
        return (heads.pop() * widths, inputs.pop()) if one else (*sorted(heads), *sorted(inputs))

    def _joined(self, name: str) -> np.ndarray:
        """A whole tensor that was cut apart, head by head; the last one is kept."""
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        info, parts = self.infos[name], []
        for place in self._places[name]:
            tensor = self._tensors[place.name]
            shape = tuple(int(n) for n in reversed(tensor.shape))
            part = self._plain(np.ascontiguousarray(tensor.data), tensor, name).reshape(shape)
            assert place.cut is not None
            parts.append(np.swapaxes(part, 1, 2) if place.cut.transposed else part)
        whole = np.concatenate(parts, axis=1).astype(info.dtype, copy=False).reshape(info.shape)
        self._last = (name, whole)
        return whole

    def _plain(self, data: np.ndarray, tensor, name: str) -> np.ndarray:
        """Stored rows as numbers: dequantised where they are quantised."""
        if tensor.tensor_type in _PLAIN:
            return data.reshape(-1).view(_PLAIN[tensor.tensor_type])
        try:
            return gguf.quants.dequantize(data, tensor.tensor_type)
        except NotImplementedError:
            raise InputError(
                f"{self.path}: tensor {name} is {tensor.tensor_type.name}, which is not read: "
                "use a Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, K quant, F16, BF16 or F32 file"
            ) from None

    def close(self) -> None:
        """Forgets the parsed file, which takes some 100 MB; reading on parses it anew."""
        _reader.cache_clear()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a GGUF file's key-value fields as plain Python values, without its tensors."""
    return _contents(_open(Path(path)))


def _open(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise InputError(f"{path} is missing")
    with open(path, "rb") as file:
        if file.read(4) != _MAGIC:
            raise InputError(f"{path} is not a GGUF file: it does not begin with GGUF")
    stat = path.stat()
    try:
        return _reader(path, stat.st_mtime_ns, stat.st_size)
    except _BROKEN as error:
        raise InputError(
            f"{path} is broken or truncated at {path.stat().st_size} bytes "
            f"({type(error).__name__}): fetch it again"
        ) from error


@functools.lru_cache(maxsize=1)  # parsing takes seconds, and a plan is read before the weights
def _reader(path: Path, mtime_ns: int, size: int) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


def _contents(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def _dtype(tensor: gguf.gguf_reader.ReaderTensor) -> np.dtype:
    return _PLAIN.get(tensor.tensor_type, np.dtype(np.float32))


def config_of(
    metadata: dict[str, Any],
    names: Collection[str],
    layout: GgufLayout,
    path: Path,
    factors: np.ndarray | None = None,
) -> dict[str, Any]:
    """config.json's fields of a file with such metadata, names of tensors and factors of rope."""
    prefix, family = layout.architecture, by_name(layout.family)
    start = len(prefix) + 1
    stored = {key[start:]: v for key, v in metadata.items() if key.startswith(f"{prefix}.")}
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "head_dim": None,
        "vocab_size": len(metadata.get("tokenizer.ggml.tokens", ())),
        "rope_theta": 10000.0,
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_gate.bias" in names,
    }
    seen = set()
    for field in layout.all_fields:
        value = stored.get(field.key)
        if value is None and field.required:
            raise InputError(f"{path} lacks the field {prefix}.{field.key}: fetch it again")
        if value is not None and field.hf not in seen:
            seen.add(field.hf)
            config[field.hf] = gguf_rope.shortest(value) if field.kind is float else value
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config |= {**layout.implied(config), **layout.fields_in(stored, path)}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if token is not None:
            config[f"{ours}_token_id"] = token
    longest = config["max_position_embeddings"]
    scaling = gguf_rope.scaling_of(stored, layout.mscales, longest, path)
    if scaling is not None:
        config["rope_scaling"] = scaling
    if factors is not None:
        said = metadata.get(gguf_rope.NUMBERS)
        config["rope_scaling"] = gguf_rope.llama3_of(factors, said, config, path)
    return config


def stored_rows(rows: np.ndarray, head_size: int) -> np.ndarray:
    """Where rows of Hugging Face's layout lie: of each head 0, C/2, 1, C/2 + 1, ... in turn."""
    head, row = np.divmod(rows, head_size)
    return head * head_size + 2 * (row % (head_size // 2)) + row // (head_size // 2)
