"""GPT-Neo: global and local attention in turn, scores without 1/sqrt(C), learned positions.

Dropout, which config.json may ask for in training, is not applied.
"""

from __future__ import annotations

import functools
from typing import Any

from moejax.core.errors import InputError
from moejax.models.config import AttentionConfig, EmbeddingConfig, ModelConfig, NormConfig
from moejax.models.families.family import Family
from moejax.models.families.fields import (
    activation_from_hf,
    activation_to_hf,
    flag,
    head_size_from_hf,
    require,
    shortest_pattern,
)
from moejax.models.families.names import name_table

REQUIRED = ("vocab_size", "num_layers", "hidden_size", "num_heads", "attention_types")
# What config.json need not say.
DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "window_size": 256,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
_LAYER = "transformer.h.{i}"
MODULES = {
    "embed/tokens": "transformer.wte",
    "embed/positions": "transformer.wpe",
    "attn_norm": f"{_LAYER}.ln_1",
    "mlp_norm": f"{_LAYER}.ln_2",
    "attn/q": f"{_LAYER}.attn.attention.q_proj",
    "attn/k": f"{_LAYER}.attn.attention.k_proj",
    "attn/v": f"{_LAYER}.attn.attention.v_proj",
    "attn/o": f"{_LAYER}.attn.attention.out_proj",
    "mlp/up": f"{_LAYER}.mlp.c_fc",
    "mlp/down": f"{_LAYER}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
}


def config_from_hf(fields: dict[str, Any]) -> ModelConfig:
    """Reads config.json's fields. Inverse: `config_to_hf`."""
    require(fields, REQUIRED, "gpt_neo")
    fields = DEFAULTS | fields
    heads, width = fields["num_heads"], fields["hidden_size"]
    inner = fields.get("intermediate_size")
    sizes = {"num_attention_heads": heads, "hidden_size": width}
    return ModelConfig(
        family="gpt_neo",
        vocab_size=fields["vocab_size"],
        num_layers=fields["num_layers"],
        d_model=width,
        d_ff=4 * width if inner is None else inner,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=head_size_from_hf(sizes),
        norm_eps=fields["layer_norm_epsilon"],
        max_position=fields["max_position_embeddings"],
        tie_embeddings=flag(fields, "tie_word_embeddings"),
        mlp_bias=True,
        activation=activation_from_hf(fields, "activation_function"),
        initializer_range=fields["initializer_range"],
        gated=False,
        attention=AttentionConfig(_windows(fields), scale=1.0, output_bias=True),
        norms=NormConfig("layer"),
        embedding=EmbeddingConfig("learned"),
    )


def _windows(fields: dict[str, Any]) -> tuple[int, ...]:
    """attention_types is a list of [kinds in turn, how often]."""
    kinds = [kind for turn, times in fields["attention_types"] for kind in list(turn) * times]
    unknown = sorted(set(kinds) - {"global", "local"})
    if unknown:
        raise InputError(f"config.json: attention type {unknown[0]!r} is neither global nor local")
    if len(kinds) != fields["num_layers"]:
        raise InputError(
            f"config.json: attention_types names {len(kinds)} layers, num_layers is "
            f"{fields['num_layers']}"
        )
    if "local" in kinds and fields["window_size"] == 0:
        raise InputError("config.json: attention_types has local layers, but window_size is 0")
    window = {"global": 0, "local": fields["window_size"]}
    return shortest_pattern(tuple(window[kind] for kind in kinds))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields, without dtype and special tokens."""
    windows = [window for run in config.runs for window in run.windows]
    kinds = ["local" if window else "global" for window in windows]
    return {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_heads": config.num_heads,
        "intermediate_size": config.d_ff,
        "attention_types": [[kinds, 1]],
        "attention_layers": kinds,
        "window_size": max(windows) or DEFAULTS["window_size"],
        "max_position_embeddings": config.max_position,
        "activation_function": activation_to_hf(config.activation, "gelu_new"),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "embed_dropout": 0.0,
        "resid_dropout": 0.0,
        "use_cache": True,
    }


def _preset(layers: int, width: int, heads: int) -> ModelConfig:
    kinds = [[["global", "local"], layers // 2]]
    return config_from_hf(dict(zip(REQUIRED, (50257, layers, width, heads, kinds), strict=True)))


PRESETS = {
    "gpt-neo-125m": _preset(12, 768, 12),
    "gpt-neo-1.3b": _preset(24, 2048, 16),
    "gpt-neo-2.7b": _preset(32, 2560, 20),
}

GPT_NEO = Family(
    name="gpt_neo",
    architecture="GPTNeoForCausalLM",
    model_type="gpt_neo",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    name_table=functools.partial(name_table, modules=MODULES),
    presets=PRESETS,
    # Masks that old checkpoints store.
    computed=r"transformer\.h\.\d+\.attn\.attention\.(masked_)?bias",
)
