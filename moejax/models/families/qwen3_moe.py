"""Qwen3-MoE (arXiv 2505.09388): Qwen3's attention, and experts of a width of their own."""

from __future__ import annotations

import functools
from typing import Any

from moejax.models.config import AttentionConfig, ModelConfig
from moejax.models.families.experts import (
    EXPERT_MODULES,
    HF_BALANCE,
    dense_layers_from_hf,
    dense_layers_to_hf,
    experts_from_hf,
    weighting_from_hf,
)
from moejax.models.families.family import Family
from moejax.models.families.fields import llama_like, llama_like_to_hf, require
from moejax.models.families.names import name_table
from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.ops.rope import RopeConfig

# What config.json need not say.
DEFAULTS: dict[str, Any] = {
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "max_position_embeddings": 32768,
    "router_aux_loss_coef": 0.001,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
}


def config_from_hf(fields: dict[str, Any]) -> ModelConfig:
    """Reads config.json's fields. Inverse: `config_to_hf`."""
    fields = DEFAULTS | fields
    require(fields, ("moe_intermediate_size",), "qwen3_moe")
    moe = MoEConfig(
        **experts_from_hf("qwen3_moe", fields, "num_experts"),
        **CONVENTIONS["qwen3_moe"] | HF_BALANCE | {"weighting": weighting_from_hf(fields)},
        balance_weight=fields["router_aux_loss_coef"],
        expert_ffn=fields["moe_intermediate_size"],
    )
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    return ModelConfig(
        **llama_like("qwen3_moe", fields),
        **dense_layers_from_hf(fields),
        attention_bias=bool(fields["attention_bias"]),
        attention=AttentionConfig(windows=(window or 0,), qk_norm="head"),
        moe=moe,
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields, without dtype and special tokens."""
    assert config.moe is not None
    window = config.attention.windows[0]
    return llama_like_to_hf(config) | {
        **dense_layers_to_hf(config),
        "attention_bias": config.attention_bias,
        "use_sliding_window": window > 0,
        "sliding_window": window or None,
        "moe_intermediate_size": config.moe.expert_ffn or config.d_ff,
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "norm_topk_prob": config.moe.weighting == "renormalized",
        "router_aux_loss_coef": config.moe.balance_weight,
        "output_router_logits": False,
    }


def _moe(width: int) -> MoEConfig:
    routing = CONVENTIONS["qwen3_moe"] | HF_BALANCE
    return MoEConfig(128, 8, **routing, balance_weight=0.001, expert_ffn=width)


_qwen3 = functools.partial(
    ModelConfig,
    "qwen3_moe",
    norm_eps=1e-6,
    rope=RopeConfig(1e6),
    max_position=40960,
    attention=AttentionConfig(qk_norm="head"),
)
# V, L, D, F, H, G, C
PRESETS = {
    "qwen3-30b-a3b": _qwen3(151936, 48, 2048, 6144, 32, 4, 128, moe=_moe(768)),
    "qwen3-235b-a22b": _qwen3(151936, 94, 4096, 12288, 64, 4, 128, moe=_moe(1536)),
}

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    name_table=functools.partial(name_table, modules=EXPERT_MODULES),
    presets=PRESETS,
)
