"""Mixtral (arXiv 2401.04088): Llama's attention, and experts for every feed-forward layer."""

from __future__ import annotations

import functools
from typing import Any

from moejax.models.config import AttentionConfig, ModelConfig
from moejax.models.families.experts import HF_BALANCE, experts_from_hf
from moejax.models.families.family import Family
from moejax.models.families.fields import llama_like, llama_like_to_hf
from moejax.models.families.names import LLAMA_MODULES, name_table
from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.ops.rope import RopeConfig

# What config.json need not say.
DEFAULTS: dict[str, Any] = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 131072,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
}
MODULES = LLAMA_MODULES | {
    "moe/router/out": "model.layers.{i}.block_sparse_moe.gate",
    "moe/experts/gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
    "moe/experts/up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
    "moe/experts/down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
}


def config_from_hf(fields: dict[str, Any]) -> ModelConfig:
    """Reads config.json's fields. Inverse: `config_to_hf`."""
    fields = DEFAULTS | fields
    moe = MoEConfig(
        **experts_from_hf("mixtral", fields, "num_local_experts"),
        **CONVENTIONS["mixtral"] | HF_BALANCE,
        balance_weight=fields["router_aux_loss_coef"],
        jitter=fields["router_jitter_noise"],
    )
    attention = AttentionConfig(windows=(fields["sliding_window"] or 0,))
    return ModelConfig(**llama_like("mixtral", fields), moe=moe, attention=attention)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields, without dtype and special tokens."""
    assert config.moe is not None
    return llama_like_to_hf(config) | {
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "router_aux_loss_coef": config.moe.balance_weight,
        "router_jitter_noise": config.moe.jitter,
        "output_router_logits": False,
        "sliding_window": config.attention.windows[0] or None,
    }


_MOE = MoEConfig(8, 2, **CONVENTIONS["mixtral"] | HF_BALANCE, balance_weight=0.001)
_mixtral = functools.partial(ModelConfig, "mixtral", norm_eps=1e-5, rope=RopeConfig(1e6), moe=_MOE)
# V, L, D, F, H, G, C
PRESETS = {
    "mixtral-8x7b": _mixtral(32000, 32, 4096, 14336, 32, 8, 128, max_position=32768),
    "mixtral-8x22b": _mixtral(32000, 56, 6144, 16384, 48, 8, 128, max_position=65536),
}

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    name_table=functools.partial(name_table, modules=MODULES),
    presets=PRESETS,
)
