"""Qwen2 and Qwen2.5 (biases of queries, keys and values), Qwen3 (norms of queries and keys)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from moejax.core.errors import InputError
from moejax.models.config import AttentionConfig, ModelConfig
from moejax.models.families.family import Family
from moejax.models.families.fields import (
    flag,
    llama_like,
    llama_like_to_hf,
    windows_from_hf,
    windows_to_hf,
)
from moejax.models.families.names import LLAMA_MODULES, name_table
from moejax.ops.rope import RopeConfig

# What config.json need not say.
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def qwen_windows(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers from max_window_layers on have a window, if use_sliding_window says so."""
    sliding = flag(fields, "use_sliding_window")
    full = fields["max_window_layers"] if sliding else fields["num_hidden_layers"]
    if not isinstance(full, int) or full < 0:
        raise InputError(f"config.json: max_window_layers must be 0 or more, got {full!r}")
    kinds = [
        "full_attention" if i < full else "sliding_attention"
        for i in range(fields["num_hidden_layers"])
    ]
    window = fields["sliding_window"] if sliding else None
    return windows_from_hf(dict(fields) | {"sliding_window": window}, kinds)


def qwen_windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields that `qwen_windows` reads."""
    found = windows_to_hf(config)
    kinds = found["layer_types"]
    first = kinds.index("sliding_attention") if found["sliding_window"] else len(kinds)
    sliding = found["sliding_window"] is not None
    return found | {"use_sliding_window": sliding, "max_window_layers": first}


def qwen2_from_hf(fields: dict[str, Any]) -> ModelConfig:
    """Reads config.json's fields. Inverse: `qwen2_to_hf`."""
    fields = DEFAULTS | fields
    common = llama_like("qwen2", fields)
    attention = AttentionConfig(qwen_windows(fields), output_bias=False)
    return ModelConfig(**common, attention_bias=True, attention=attention)


def qwen2_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields, without dtype and special tokens."""
    return llama_like_to_hf(config) | qwen_windows_to_hf(config)


def qwen3_from_hf(fields: dict[str, Any]) -> ModelConfig:
    """Reads config.json's fields. Inverse: `qwen3_to_hf`."""
    fields = DEFAULTS | {"head_dim": 128} | fields
    common = llama_like("qwen3", fields)
    attention = AttentionConfig(qwen_windows(fields), qk_norm="head")
    bias = flag(fields, "attention_bias")
    return ModelConfig(**common, attention_bias=bias, attention=attention)


def qwen3_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields, without dtype and special tokens."""
    return qwen2_to_hf(config) | {"attention_bias": config.attention_bias}


_qwen2 = functools.partial(
    ModelConfig,
    "qwen2",
    rope=RopeConfig(1e6),
    attention_bias=True,
    attention=AttentionConfig(output_bias=False),
)
_qwen3 = functools.partial(
    ModelConfig, "qwen3", rope=RopeConfig(1e6), attention=AttentionConfig(qk_norm="head")
)
_SHORT: dict[str, Any] = {"max_position": 32768}
_LONG: dict[str, Any] = {"max_position": 131072}
_LONG3: dict[str, Any] = {"max_position": 40960}
# V, L, D, F, H, G, C
QWEN2_PRESETS = {
    "qwen2-0.5b": _qwen2(151936, 24, 896, 4864, 14, 2, 64, tie_embeddings=True, **_LONG),
    "qwen2-1.5b": _qwen2(151936, 28, 1536, 8960, 12, 2, 128, tie_embeddings=True, **_LONG),
    "qwen2-7b": _qwen2(152064, 28, 3584, 18944, 28, 4, 128, **_LONG),
    "qwen2.5-0.5b": _qwen2(151936, 24, 896, 4864, 14, 2, 64, tie_embeddings=True, **_SHORT),
    "qwen2.5-1.5b": _qwen2(151936, 28, 1536, 8960, 12, 2, 128, tie_embeddings=True, **_LONG),
    "qwen2.5-3b": _qwen2(151936, 36, 2048, 11008, 16, 2, 128, tie_embeddings=True, **_SHORT),
    "qwen2.5-7b": _qwen2(152064, 28, 3584, 18944, 28, 4, 128, **_LONG),
}
QWEN3_PRESETS = {
    "qwen3-0.6b": _qwen3(151936, 28, 1024, 3072, 16, 8, 128, tie_embeddings=True, **_LONG3),
    "qwen3-1.7b": _qwen3(151936, 28, 2048, 6144, 16, 8, 128, tie_embeddings=True, **_LONG3),
    "qwen3-4b": _qwen3(151936, 36, 2560, 9728, 32, 8, 128, tie_embeddings=True, **_LONG3),
    "qwen3-8b": _qwen3(151936, 36, 4096, 12288, 32, 8, 128, **_LONG3),
}

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    config_from_hf=qwen2_from_hf,
    config_to_hf=qwen2_to_hf,
    name_table=functools.partial(name_table, modules=LLAMA_MODULES),
    presets=QWEN2_PRESETS,
)
QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    config_from_hf=qwen3_from_hf,
    config_to_hf=qwen3_to_hf,
    name_table=functools.partial(name_table, modules=LLAMA_MODULES),
    presets=QWEN3_PRESETS,
)
