"""OLMoE (arXiv 2409.02060): 64 small experts, and norms of all heads' queries and keys together."""

from __future__ import annotations

import functools
from typing import Any

from moejax.models.config import AttentionConfig, ModelConfig
from moejax.models.families.experts import (
    EXPERT_MODULES,
    HF_BALANCE,
    experts_from_hf,
    weighting_from_hf,
)
from moejax.models.families.family import Family
from moejax.models.families.fields import llama_like, llama_like_to_hf
from moejax.models.families.names import name_table
from moejax.moe.config import CONVENTIONS, MoEConfig

# What config.json need not say.
DEFAULTS: dict[str, Any] = {
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "router_aux_loss_coef": 0.01,
    "attention_bias": False,
    "clip_qkv": None,
}


def config_from_hf(fields: dict[str, Any]) -> ModelConfig:
    """Reads config.json's fields. Inverse: `config_to_hf`."""
    fields = DEFAULTS | fields
    moe = MoEConfig(
        **experts_from_hf("olmoe", fields, "num_experts"),
        **CONVENTIONS["olmoe"] | HF_BALANCE | {"weighting": weighting_from_hf(fields)},
        balance_weight=fields["router_aux_loss_coef"],
    )
    return ModelConfig(
        **llama_like("olmoe", fields),
        attention_bias=bool(fields["attention_bias"]),
        attention=AttentionConfig(qk_norm="all", clip=fields["clip_qkv"]),
        moe=moe,
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields, without dtype and special tokens."""
    assert config.moe is not None
    fields = llama_like_to_hf(config) | {
        "attention_bias": config.attention_bias,
        "clip_qkv": config.attention.clip,
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "norm_topk_prob": config.moe.weighting == "renormalized",
        "router_aux_loss_coef": config.moe.balance_weight,
        "output_router_logits": False,
    }
    del fields["head_dim"]  # always hidden_size / num_attention_heads
    return fields


_NORMED = AttentionConfig(qk_norm="all")
PRESETS = {
    # V, L, D, F, H, G, C, eps
    "olmoe-1b-7b": ModelConfig(
        *("olmoe", 50304, 16, 2048, 1024, 16, 16, 128, 1e-5),
        max_position=4096,
        attention=_NORMED,
        moe=MoEConfig(64, 8, **CONVENTIONS["olmoe"] | HF_BALANCE, balance_weight=0.01),
    ),
}

OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    name_table=functools.partial(name_table, modules=EXPERT_MODULES),
    presets=PRESETS,
)
