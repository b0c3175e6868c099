"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): Qwen2's attention, and a gated shared network."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from moejax.models.config import AttentionConfig, ModelConfig
from moejax.models.families.experts import (
    EXPERT_MODULES,
    HF_BALANCE,
    dense_layers_from_hf,
    dense_layers_to_hf,
    experts_from_hf,
    shared_modules,
    weighting_from_hf,
)
from moejax.models.families.family import Family
from moejax.models.families.fields import (
    llama_like,
    llama_like_to_hf,
    require,
    windows_from_hf,
    windows_to_hf,
)
from moejax.models.families.names import name_table
from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.ops.rope import RopeConfig

# What config.json need not say.
DEFAULTS: dict[str, Any] = {
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "max_position_embeddings": 32768,
    "router_aux_loss_coef": 0.001,
    "qkv_bias": True,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
MODULES = EXPERT_MODULES | {
    **shared_modules("shared_expert"),
    "moe/shared/mix": "model.layers.{i}.mlp.shared_expert_gate",
}


def _windows(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Every second one of the first max_window_layers has a window, if use_sliding_window."""
    sliding = bool(fields["use_sliding_window"])
    kinds = [
        "sliding_attention"
        if sliding and i % 2 == 0 and i < fields["max_window_layers"]
        else "full_attention"
        for i in range(fields["num_hidden_layers"])
    ]
    window = fields["sliding_window"] if sliding else None
    return windows_from_hf(dict(fields) | {"sliding_window": window}, kinds)


def config_from_hf(fields: dict[str, Any]) -> ModelConfig:
    """Reads config.json's fields. Inverse: `config_to_hf`."""
    fields = DEFAULTS | fields
    require(fields, ("moe_intermediate_size", "shared_expert_intermediate_size"), "qwen2_moe")
    moe = MoEConfig(
        **experts_from_hf("qwen2_moe", fields, "num_experts"),
        **CONVENTIONS["qwen2_moe"] | HF_BALANCE | {"weighting": weighting_from_hf(fields)},
        balance_weight=fields["router_aux_loss_coef"],
        expert_ffn=fields["moe_intermediate_size"],
        shared_ffn=fields["shared_expert_intermediate_size"],
    )
    return ModelConfig(
        **llama_like("qwen2_moe", fields),
        **dense_layers_from_hf(fields),
        attention_bias=bool(fields["qkv_bias"]),
        attention=AttentionConfig(_windows(fields), output_bias=False),
        moe=moe,
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields, without dtype and special tokens."""
    assert config.moe is not None
    windows = windows_to_hf(config)
    return llama_like_to_hf(config) | {
        **dense_layers_to_hf(config),
        **windows,
        "qkv_bias": config.attention_bias,
        "use_sliding_window": windows["sliding_window"] is not None,
        "max_window_layers": config.num_layers,
        "moe_intermediate_size": config.moe.expert_ffn or config.d_ff,
        "shared_expert_intermediate_size": config.moe.shared_ffn,
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "norm_topk_prob": config.moe.weighting == "renormalized",
        "router_aux_loss_coef": config.moe.balance_weight,
        "output_router_logits": False,
    }


def _moe(num_experts: int, top_k: int, width: int, shared: int) -> MoEConfig:
    return MoEConfig(
        *(num_experts, top_k),
        **CONVENTIONS["qwen2_moe"] | HF_BALANCE,
        balance_weight=0.001,
        expert_ffn=width,
        shared_ffn=shared,
    )


_qwen2 = functools.partial(
    ModelConfig,
    "qwen2_moe",
    norm_eps=1e-6,
    rope=RopeConfig(1e6),
    attention_bias=True,
    attention=AttentionConfig(output_bias=False),
)
# V, L, D, F, H, G, C
PRESETS = {
    "qwen1.5-moe-a2.7b": _qwen2(
        *(151936, 24, 2048, 5632, 16, 16, 128), max_position=8192, moe=_moe(60, 4, 1408, 5632)
    ),
    "qwen2-57b-a14b": _qwen2(
        *(151936, 28, 3584, 18944, 28, 4, 128), max_position=131072, moe=_moe(64, 8, 2560, 20480)
    ),
}

QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    name_table=functools.partial(name_table, modules=MODULES),
    presets=PRESETS,
)
