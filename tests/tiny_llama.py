"""Models small enough for a test, as Hugging Face lays them out; Llamas, one per option."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.core import tree
from moejax.io.safetensors import Entry, Info, write_folder
from moejax.io.tokenizer import Tokenizer
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.models.families import by_architecture
from tests.tiny_tokenizer import gguf_fields

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 67,
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
GROUPED = {"num_key_value_heads": 2, "tie_word_embeddings": True}
EVERYTHING = GROUPED | {
    "head_dim": 10,
    "attention_bias": True,
    "mlp_bias": True,
    "rope_scaling": LLAMA3,
    "rope_theta": 500000.0,
    "hidden_act": "gelu_pytorch_tanh",
}
# Rows are longer than `dynamic`'s and `llama3`'s original length, where those schemes begin to act.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped_tied": GROUPED,
    "one_kv_head_of_odd_size": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "theta": {"rope_theta": 100000.0, "rms_norm_eps": 1e-6},
    "linear": {"rope_scaling": LINEAR},
    "dynamic": {"rope_scaling": DYNAMIC, "max_position_embeddings": 16},
    "dynamic_short": {"rope_scaling": DYNAMIC, "max_position_embeddings": 4096},
    "llama3": {"rope_scaling": LLAMA3},
    "gelu": {"hidden_act": "gelu"},
    "everything": EVERYTHING,
}
TOKENS = np.random.default_rng(1).integers(0, BASE["vocab_size"], (2, 40)).astype(np.int32)


def fields_of(case: str) -> dict[str, Any]:
    """config.json's fields of a case, in transformers 4's spelling."""
    return copy.deepcopy(BASE | CASES[case])  # transformers writes into what it is given


def tensors_of(fields: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights by Hugging Face name, large enough that every option shows.

    Any family's; a tensor's values depend on its name and shape alone.
    """
    family = by_architecture(fields["architectures"][0])
    tensors = {}
    for weight in family.name_table(family.config_from_hf(dict(fields))):
        rng = np.random.default_rng([seed, zlib.crc32(weight.hf_name.encode())])
        value = rng.random(weight.hf_shape, dtype=np.float32) * 2 - 1
        if weight.path.endswith(("/scale", "/delta")):
            value = float(weight.path.endswith("/scale")) + value / 2
        elif len(weight.hf_shape) > 1 and not weight.path.startswith("embed/pos"):
            value *= 3 / np.sqrt(np.float32(weight.hf_shape[1]))
        tensors[weight.hf_name] = value.astype(np.float32)
    return tensors


def write_llama(
    folder: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    max_shard_bytes: int = 1 << 30,
) -> Path:
    """A folder as the hub has it, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(fields)))
    entries = [
        Entry(name, Info(value.shape, value.dtype), lambda value=value: value)
        for name, value in tensors.items()
    ]
    write_folder(folder, entries, max_shard_bytes)
    return folder


def random_params(config: ModelConfig, dtype: str = "float32") -> tree.Tree:
    """A whole tree of numpy arrays, for tests that compute nothing with it."""
    rng = np.random.default_rng(0)
    return tree.map_with_path(
        lambda _, leaf: rng.random(leaf.shape, dtype=np.float32).astype(leaf.dtype),
        transformer.abstract_params(config, dtype),
    )


def write_tokenizer(folder: Path) -> int:
    """Adds a tokenizer to a folder; returns how many tokens it has."""
    tokenizer = Tokenizer.from_gguf_metadata(gguf_fields())
    tokenizer.save(folder)
    return tokenizer.vocab_size
