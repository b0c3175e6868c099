"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434): latent attention, shared and many small experts.

Where transformers 5.23 computes something else than the code released with the weights, this is the
released one: norm_topk_prob divides the weights by their sum in place of routed_scaling_factor
(transformers ignores it), as `MoEGate` of the released modeling_deepseek.py does for more than one
expert per token; its seq_aux loss is balance "sequence", else "switch". mscale or mscale_all_dim
alone, which no released model has and they read differently, is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from moejax.core.errors import InputError
from moejax.models.config import AttentionConfig, ModelConfig
from moejax.models.families.experts import EXPERT_MODULES, experts_from_hf, shared_modules
from moejax.models.families.family import Family
from moejax.models.families.fields import llama_like, llama_like_to_hf, require
from moejax.models.families.names import name_table
from moejax.models.mla import MLAConfig, yarn_softmax_scale
from moejax.moe.config import CONVENTIONS, MoEConfig

DEFAULTS: dict[str, Any] = {  # what config.json need not say
    **{"n_shared_experts": None, "first_k_dense_replace": 0, "q_lora_rank": None},
    **{"topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    **{"attention_bias": False, "aux_loss_alpha": 0.001, "seq_aux": True},
}
# Read only so. The two first are not in transformers' class, the third not in the released one.
ONLY = {"moe_layer_freq": 1, "scoring_func": "softmax", "mlp_bias": False}
SIZES = {
    "kv_lora_rank": "kv_rank",
    "q_lora_rank": "q_rank",
    "qk_nope_head_dim": "nope_size",
    "qk_rope_head_dim": "rope_size",
    "v_head_dim": "v_size",
}
MODULES = EXPERT_MODULES | {
    "attn/q_down": "model.layers.{i}.self_attn.q_a_proj",
    "attn/q_norm": "model.layers.{i}.self_attn.q_a_layernorm",
    "attn/q_up": "model.layers.{i}.self_attn.q_b_proj",
    "attn/kv_down": "model.layers.{i}.self_attn.kv_a_proj_with_mqa",
    "attn/kv_norm": "model.layers.{i}.self_attn.kv_a_layernorm",
    "attn/kv_up": "model.layers.{i}.self_attn.kv_b_proj",
    **shared_modules("shared_experts"),
}


def config_from_hf(fields: dict[str, Any]) -> ModelConfig:
    """Reads config.json's fields. Inverse: `config_to_hf`."""
    fields = DEFAULTS | fields
    needed = {*SIZES, "moe_intermediate_size", "n_routed_experts"} - {"q_lora_rank"}
    require(fields, sorted(needed), "deepseek_v2")
    for name, value in ONLY.items():
        if fields.get(name, value) != value:
            raise InputError(f"config.json: {name} {fields[name]!r} is not read, only {value!r}")
    mla = MLAConfig(**{ours: fields[theirs] for theirs, ours in SIZES.items()})
    heads = {"head_dim": mla.head_size, "num_key_value_heads": fields.get("num_attention_heads")}
    common = llama_like("deepseek_v2", fields | heads)
    return ModelConfig(
        **common,
        num_dense_layers=fields["first_k_dense_replace"],
        attention_bias=bool(fields["attention_bias"]),
        attention=AttentionConfig(scale=yarn_softmax_scale(common["rope"], mla.head_size)),
        moe=_moe_from_hf(fields),
        mla=mla,
    )


def _moe_from_hf(fields: Mapping[str, Any]) -> MoEConfig:
    method, groups = fields["topk_method"], {}
    if method == "group_limited_greedy":
        require(fields, ("n_group", "topk_group"), "deepseek_v2")
        groups = {"num_groups": fields["n_group"], "top_groups": fields["topk_group"]}
    elif method != "greedy":
        raise InputError(f"config.json: topk_method {method!r} is not one of DeepSeek-V2's")
    experts = experts_from_hf("deepseek_v2", fields, "n_routed_experts")
    renormalized = bool(fields["norm_topk_prob"]) and experts["top_k"] > 1
    weighting = "renormalized" if renormalized else "scores"
    balance = "sequence" if fields["seq_aux"] else "switch"
    return MoEConfig(
        **experts,
        **CONVENTIONS["deepseek_v2"] | {"weighting": weighting, "balance": balance},
        **groups,
        scale=1.0 if renormalized else fields["routed_scaling_factor"],
        balance_weight=fields["aux_loss_alpha"],
        expert_ffn=fields["moe_intermediate_size"],
        shared_ffn=fields["moe_intermediate_size"] * (fields["n_shared_experts"] or 0),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json's fields, without dtype and special tokens."""
    assert config.moe is not None and config.mla is not None
    moe, width = config.moe, config.moe.expert_ffn or config.d_ff
    limited = moe.num_groups > 1
    fields = (
        llama_like_to_hf(config)
        | ONLY
        | {
            **{theirs: getattr(config.mla, ours) for theirs, ours in SIZES.items()},
            "attention_bias": config.attention_bias,
            "first_k_dense_replace": config.num_dense_layers,
            "moe_intermediate_size": width,
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            # transformers has no model without shared experts.
            "n_shared_experts": moe.shared_ffn // width or None,
            "topk_method": "group_limited_greedy" if limited else "greedy",
            "n_group": moe.num_groups,
            "topk_group": moe.top_groups,
            "norm_topk_prob": moe.weighting == "renormalized",
            "routed_scaling_factor": moe.scale,
            "aux_loss_alpha": moe.balance_weight,
            "seq_aux": moe.balance == "sequence",
        }
    )
    del fields["head_dim"]
    return fields


_LITE: dict[str, Any] = {
    **{"vocab_size": 102400, "num_hidden_layers": 27, "hidden_size": 2048},
    **{"intermediate_size": 10944, "num_attention_heads": 16, "max_position_embeddings": 163840},
    **{"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    **{"n_shared_experts": 2, "first_k_dense_replace": 1, "rope_theta": 10000},
    "rope_scaling": {
        **{"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
        **{"beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
}
_WHOLE = _LITE | {
    **{"num_hidden_layers": 60, "hidden_size": 5120, "intermediate_size": 12288},
    **{"num_attention_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 160},
    **{"moe_intermediate_size": 1536, "routed_scaling_factor": 16.0, "n_group": 8},
    **{"topk_group": 3, "topk_method": "group_limited_greedy"},
}
_UNIT = _LITE["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0}  # V2.5, Coder-V2

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    name_table=functools.partial(name_table, modules=MODULES),
    presets={
        "deepseek-v2-lite": config_from_hf(_LITE),
        "deepseek-v2": config_from_hf(_WHOLE),
        "deepseek-v2.5": config_from_hf(_WHOLE | {"rope_scaling": _UNIT}),
    },
)
