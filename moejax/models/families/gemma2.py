"""Gemma 2 (arXiv 2408.00118): soft caps, norms before and after, local and global layers in turn.

Its norms multiply by 1 + w and its checkpoints store w. We store w too (the leaf is called delta,
not scale, and the norm adds the 1): 1 + w in bfloat16 would lose the low bits of w, and the way
back would not give the file's bytes.
"""

from __future__ import annotations

import functools
from typing import Any

from moejax.core.errors import InputError
from moejax.models.config import AttentionConfig, EmbeddingConfig, ModelConfig, NormConfig
from moejax.models.families.family import Family
from moejax.models.families.fields import (
    activation_to_hf,
    flag,
    llama_like,
    llama_like_to_hf,
    windows_from_hf,
    windows_to_hf,
)
from moejax.models.families.names import LLAMA_MODULES, name_table

# What config.json need not say.
DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
MODULES = LLAMA_MODULES | {
    "attn_post_norm": "model.layers.{i}.post_attention_layernorm",
    "mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}
NORMS = NormConfig("rms_delta", "sandwich")


def config_from_hf(fields: dict[str, Any]) -> ModelConfig:
    """Reads config.json's fields. Inverse: `config_to_hf`."""
    fields = DEFAULTS | fields
    if flag(fields, "use_bidirectional_attention"):
        raise InputError("config.json: use_bidirectional_attention is not read, only causal models")
    common = llama_like("gemma2", fields, "hidden_activation")
    pair = ("sliding_attention", "full_attention")
    kinds = [pair[i % 2] for i in range(common["num_layers"])]
    scalar = fields["query_pre_attn_scalar"]
    if not scalar > 0:
        raise InputError(f"config.json: query_pre_attn_scalar must be above 0, got {scalar}")
    attention = AttentionConfig(
        windows=windows_from_hf(fields, kinds),
        scale=scalar**-0.5,
        soft_cap=fields["attn_logit_softcapping"],
    )
    return ModelConfig(
        **common,
        attention_bias=flag(fields, "attention_bias"),
        attention=attention,
        norms=NORMS,
        embedding=EmbeddingConfig(scaled=True, logit_soft_cap=fields["final_logit_softcapping"]),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields, without dtype and special tokens."""
    scale = config.attention.scale or config.head_size**-0.5
    scalar = scale**-2
    # It was an integer; its square root and back may miss it by a rounding.
    scalar = round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar
    activation = activation_to_hf(config.activation, "gelu_pytorch_tanh")
    return (
        llama_like_to_hf(config)
        | windows_to_hf(config)
        | {
            "attention_bias": config.attention_bias,
            "hidden_act": activation,
            "hidden_activation": activation,
            "query_pre_attn_scalar": scalar,
            "attn_logit_softcapping": config.attention.soft_cap,
            "final_logit_softcapping": config.embedding.logit_soft_cap,
        }
    )


_gemma2 = functools.partial(
    ModelConfig,
    "gemma2",
    256000,
    max_position=8192,
    tie_embeddings=True,
    activation="gelu_tanh",
    norms=NORMS,
    embedding=EmbeddingConfig(scaled=True, logit_soft_cap=30.0),
)
_SMALL = AttentionConfig((4096, 0), 256**-0.5, 50.0)
_LARGE = AttentionConfig((4096, 0), 144**-0.5, 50.0)
# L, D, F, H, G, C
PRESETS = {
    "gemma-2-2b": _gemma2(26, 2304, 9216, 8, 4, 256, attention=_SMALL),
    "gemma-2-9b": _gemma2(42, 3584, 14336, 16, 8, 256, attention=_SMALL),
    "gemma-2-27b": _gemma2(46, 4608, 36864, 32, 16, 128, attention=_LARGE),
}

GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    name_table=functools.partial(name_table, modules=MODULES),
    presets=PRESETS,
)
