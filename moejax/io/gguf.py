"""GGUF files (llama.cpp's format) read as Hugging Face tensors and a Hugging Face config.

llama.cpp rotates neighbouring channels where Hugging Face rotates the two halves of a head, so its
converter reorders the rows of every query and key head; `_half_split` undoes that.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type

from moejax.core.errors import InputError
from moejax.io.safetensors import Info
from moejax.models.families import FAMILIES, Family

_MAGIC = b"GGUF"
_PLAIN = {
    Type.F32: np.dtype(np.float32),
    Type.F16: np.dtype(np.float16),
    Type.BF16: np.dtype(ml_dtypes.bfloat16),
}
# What gguf's reader raises on a file that ends early or is not what it says.
_BROKEN = (ValueError, IndexError, KeyError, OverflowError, TypeError)

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
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
        self.family = _family(self.metadata, self.path)
        self._tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
        factors = self._tensors.pop(_ROPE_FACTORS, None)
        names = self._tensors.keys()
        self.config = _hf_config(self.metadata, names, self.family, self.path)
        if factors is not None:
            self.config["rope_scaling"] = _rope_scaling(factors.data, self.config, self.path)
        self.infos = {
            name: Info(tuple(int(n) for n in reversed(t.shape)), _dtype(t))
            for name, t in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor in Hugging Face's layout, in memory of its own."""
        tensor, info = self._tensors[name], self.infos[name]
        if tensor.tensor_type in _PLAIN:
            value = np.array(tensor.data).reshape(-1).view(info.dtype).reshape(info.shape)
        else:
            try:
                value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError:
                raise InputError(
                    f"{self.path}: tensor {name} is {tensor.tensor_type.name}, which is not read: "
                    "use a Q4_0, Q4_1, Q8_0, F16, BF16 or F32 file"
                ) from None
        if ".q_proj." in name:
            return _half_split(value, self.config["num_attention_heads"])
        if ".k_proj." in name:
            return _half_split(value, self.config["num_key_value_heads"])
        return value

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


def _family(metadata: dict[str, Any], path: Path) -> Family:
    name = metadata.get("general.architecture")
    for family in FAMILIES:
        if family.gguf_architecture is not None and family.gguf_architecture == name:
            if metadata.get(f"{name}.expert_count"):
                raise InputError(
                    f"{path} holds a mixture of experts: only dense GGUF files are read"
                )
            return family
    known = ", ".join(f.gguf_architecture for f in FAMILIES if f.gguf_architecture)
    raise InputError(f"{path} has GGUF architecture {name!r}: moejax reads {known}")


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; a name that has none stays, and the importer refuses it."""
    block = _BLOCK.fullmatch(name)
    if block and block[2] in _LAYER:
        return f"model.layers.{block[1]}.{_LAYER[block[2]]}.{block[3]}"
    return _TOP.get(name, name)


def _dtype(tensor: gguf.gguf_reader.ReaderTensor) -> np.dtype:
    return _PLAIN.get(tensor.tensor_type, np.dtype(np.float32))


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 was 1e-05 once."""
    return float(str(np.float32(value)))


def _hf_config(metadata: dict[str, Any], names, family: Family, path: Path) -> dict[str, Any]:
    prefix = family.gguf_architecture

    def required(key: str) -> Any:
        if f"{prefix}.{key}" not in metadata:
            raise InputError(f"{path} lacks the field {prefix}.{key}: fetch it again")
        return metadata[f"{prefix}.{key}"]

    optional = functools.partial(_optional, metadata, prefix)
    heads, width = required("attention.head_count"), required("embedding_length")
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "num_hidden_layers": required("block_count"),
        "hidden_size": width,
        "intermediate_size": required("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": optional("attention.head_count_kv", heads),
        "head_dim": optional("attention.key_length", optional("rope.dimension_count", None)),
        "max_position_embeddings": required("context_length"),
        "rms_norm_eps": _shortest(required("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(optional("rope.freq_base", 10000.0)),
        "vocab_size": optional("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ()))),
        "tie_word_embeddings": "lm_head.weight" not in names,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in names,
    }
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


def _half_split(value: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from (0, C/2, 1, C/2 + 1, ...) back to (0, 1, 2, ...)."""
    pairs = value.reshape(num_heads, -1, 2, *value.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(value.shape)
