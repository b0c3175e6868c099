"""Llama and all that took its shape: SmolLM2, TinyLlama, DeepSeek-Coder, Llama 2 and 3."""

from __future__ import annotations

import functools
from typing import Any

from moejax.models.config import ModelConfig
from moejax.models.families.family import Family
from moejax.models.families.fields import flag, llama_like, llama_like_to_hf
from moejax.models.families.names import LLAMA_MODULES, name_table
from moejax.ops.rope import RopeConfig


def config_from_hf(fields: dict[str, Any]) -> ModelConfig:
    """Reads config.json's fields, of transformers 4 (`rope_scaling`) or 5 (`rope_parameters`)."""
    return ModelConfig(
        **llama_like("llama", fields),
        attention_bias=flag(fields, "attention_bias"),
        mlp_bias=flag(fields, "mlp_bias"),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields, without dtype and special tokens. Inverse: `config_from_hf`."""
    return llama_like_to_hf(config) | {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "pretraining_tp": 1,
    }


_config = functools.partial(ModelConfig, "llama")
_LLAMA31 = RopeConfig(5e5, "llama3", 8.0, original_max_position=8192)
_LLAMA32 = RopeConfig(5e5, "llama3", 32.0, original_max_position=8192)
_CODER = RopeConfig(1e5, "linear", 4.0)
# V, L, D, F, H, G, C, eps, rope, max_position, tied
PRESETS = {
    "smollm2-135m": _config(49152, 30, 576, 1536, 9, 3, 64, 1e-5, RopeConfig(1e5), 8192, True),
    "smollm2-360m": _config(49152, 32, 960, 2560, 15, 5, 64, 1e-5, RopeConfig(1e5), 8192, True),
    "smollm2-1.7b": _config(49152, 24, 2048, 8192, 32, 32, 64, 1e-5, RopeConfig(1.3e5), 8192, True),
    "tinyllama-1.1b": _config(32000, 22, 2048, 5632, 32, 4, 64, 1e-5),
    "llama-2-7b": _config(32000, 32, 4096, 11008, 32, 32, 128, 1e-5, max_position=4096),
    "llama-2-13b": _config(32000, 40, 5120, 13824, 40, 40, 128, 1e-5, max_position=4096),
    "llama-3-8b": _config(128256, 32, 4096, 14336, 32, 8, 128, 1e-5, RopeConfig(5e5), 8192),
    "llama-3.1-8b": _config(128256, 32, 4096, 14336, 32, 8, 128, 1e-5, _LLAMA31, 131072),
    "llama-3.2-1b": _config(128256, 16, 2048, 8192, 32, 8, 64, 1e-5, _LLAMA32, 131072, True),
    "llama-3.2-3b": _config(128256, 28, 3072, 8192, 24, 8, 128, 1e-5, _LLAMA32, 131072, True),
    "deepseek-coder-1.3b": _config(32256, 24, 2048, 5504, 16, 16, 128, 1e-6, _CODER, 16384),
    "deepseek-coder-6.7b": _config(32256, 32, 4096, 11008, 32, 32, 128, 1e-6, _CODER, 16384),
}

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    name_table=functools.partial(name_table, modules=LLAMA_MODULES),
    presets=PRESETS,
)
