"""GGUF files (llama.cpp's format) read as Hugging Face tensors and a Hugging Face config.

llama.cpp rotates neighbouring channels where Hugging Face rotates the two halves of a head, so its
converter reorders the rows of every query and key head; `stored_rows` says where they went.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type

from moejax.core.errors import InputError
from moejax.io.gguf_layout import FIELDS, GgufLayout, Place, layout_of_file, places
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

# Frequency factors of the "llama3" rope; llama.cpp stores them in place of the scheme's numbers.
_ROPE_FACTORS = "rope_freqs.weight"


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
        factors = stored.pop(_ROPE_FACTORS, None)
        self.config = _hf_config(self.metadata, stored.keys(), self.layout, self.path)
        if factors is not None:
            self.config["rope_scaling"] = _rope_scaling(factors.data, self.config, self.path)
        model = self.family.config_from_hf(self.config)
        table = self.family.name_table(model)
        self._places = places(self.layout, model, table)
        self._tensors = stored
        used = {place.name for place in self._places.values()}
        # A tensor without a place keeps its name, and the importer refuses it.
        self._places |= {n: Place(n, None, 0, False) for n in stored.keys() - used}
        shapes = {weight.hf_name: weight.hf_shape for weight in table}
        self.infos = {
            name: self._info(place, shapes.get(name))
            for name, place in self._places.items()
            if place.name in stored
        }

    def _info(self, place: Place, wanted: tuple[int, ...] | None) -> Info:
        tensor = self._tensors[place.name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if place.expert is not None:
            # Too few experts show as a shape that does not fit.
            shape = shape[1:] if len(shape) == 3 and place.expert < shape[0] else shape
        elif wanted is not None and len(shape) == 1 and wanted == (1, *shape):
            shape = wanted
        return Info(shape, _dtype(tensor))

    def read(self, name: str, rows: Range = None, columns: Range = None) -> np.ndarray:
        """Returns one tensor in Hugging Face's layout, or these rows and columns of it."""
        place, info = self._places[name], self.infos[name]
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

    @staticmethod
    def config_of(metadata, names, layout: GgufLayout, place: Path) -> dict[str, Any]:
        """config.json's fields of a file with such metadata and names of tensors."""
        return _hf_config(metadata, names, layout, place)

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


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 was 1e-05 once."""
    return float(str(np.float32(value)))


def _hf_config(metadata: dict[str, Any], names, layout: GgufLayout, path: Path) -> dict[str, Any]:
    prefix, family = layout.architecture, by_name(layout.family)
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
    for field in (*FIELDS, *layout.fields):
        value = metadata.get(f"{prefix}.{field.key}")
        if value is None and field.required:
            raise InputError(f"{path} lacks the field {prefix}.{field.key}: fetch it again")
        if value is not None and field.hf not in seen:
            seen.add(field.hf)
            config[field.hf] = _shortest(value) if field.kind is float else value
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config |= layout.implied(config)
    optional = functools.partial(_optional, metadata, prefix)
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if token is not None:
            config[f"{ours}_token_id"] = token
    kind = optional("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise InputError(f"{path}: rope scaling {kind!r} of a GGUF file is not read: use linear")
    if kind == "linear":
        factor = _shortest(optional("rope.scaling.factor", 1.0))
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return config


def _optional(metadata: dict[str, Any], prefix: str | None, key: str, default: Any) -> Any:
    return metadata.get(f"{prefix}.{key}", default)


def _rope_scaling(factors: np.ndarray, config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Finds the "llama3" numbers behind the stored factors: Llama 3.1's and 3.2's, else refuses."""
    factor = float(np.max(factors))
    low, high, original = 1.0, 4.0, 8192
    size = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    wavelength = 2 * np.pi * config["rope_theta"] ** (np.arange(0, size, 2) / size)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise InputError(
            f"{path}: {_ROPE_FACTORS} is not Llama 3's rope scaling: nothing else is read"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def stored_rows(rows: np.ndarray, head_size: int) -> np.ndarray:
    """Where rows of Hugging Face's layout lie: of each head 0, C/2, 1, C/2 + 1, ... in turn."""
    head, row = np.divmod(rows, head_size)
    return head * head_size + 2 * (row % (head_size // 2)) + row // (head_size // 2)
