"""Tiny configs of every family that between them switch on every option, and the text they read.

In transformers 4's spelling of config.json. Windows are shorter than the text, and so are the
original lengths of those rope kinds that begin to act there.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from tests import tiny_llama

VOCAB = 61
# Teacher-forced decoding begins after the first so many tokens and reads NUM_DECODED more.
NUM_PREFILLED = 12
NUM_DECODED = 32
TOKENS = (
    np.random.default_rng(5)
    .integers(0, VOCAB, (2, NUM_PREFILLED + NUM_DECODED))
    .astype(np.int32)
)
# Of these the logits are committed: every fourth, the last one too.
GOLDEN_POSITIONS = slice(3, None, 4)
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
WHOLE_YARN = YARN | {"attention_factor": 1.2, "truncate": False}
MSCALE_YARN = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}
LLAMA3, LINEAR, DYNAMIC = tiny_llama.LLAMA3, tiny_llama.LINEAR, tiny_llama.DYNAMIC
_FULL, _LOCAL = "full_attention", "sliding_attention"
_LLAMA = {
    "grouped_tied": {"tie_word_embeddings": True},
    "llama3_biases_odd_head": {
        "rope_scaling": LLAMA3,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 10,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "linear_mha": {"rope_scaling": LINEAR, "num_key_value_heads": 4},
    "dynamic": {"rope_scaling": DYNAMIC, "max_position_embeddings": 16},
    "yarn": {"rope_scaling": YARN, "num_attention_heads": 3, "num_key_value_heads": 1},
    "yarn_mscale": {"rope_scaling": MSCALE_YARN, "head_dim": 14},
}
_QWEN2 = {
    "grouped_tied": {"tie_word_embeddings": True, "use_sliding_window": False},
    "window_from_layer_1": {
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "num_key_value_heads": 4,
    },
    "layer_types_yarn": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": [_LOCAL, _FULL, _LOCAL],
        "rope_scaling": WHOLE_YARN,
    },
    "dynamic": {"rope_scaling": DYNAMIC, "max_position_embeddings": 16, "head_dim": 10},
}
_QWEN3 = {
    "grouped_odd_head": {"head_dim": 10, "tie_word_embeddings": True},
    "biases_window_yarn": {
        "head_dim": 6,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
        "rope_scaling": YARN,
        "num_key_value_heads": 4,
    },
}
_GEMMA2 = {
    "grouped_tied": {"head_dim": 10, "sliding_window": 6, "query_pre_attn_scalar": 24},
    "biases_untied_linear": {
        "head_dim": 8,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_scaling": LINEAR,
        "sliding_window": 9,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "layer_types": [_FULL, _FULL, _LOCAL],
    },
    "no_caps": {
        "head_dim": 6,
        "num_attention_heads": 3,
        "hidden_size": 27,
        "num_key_value_heads": 1,
        "sliding_window": 4,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "hidden_activation": "gelu",
    },
}
_OPT_SHAPE = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "ffn_dim": 40,
    "num_attention_heads": 4,
    "max_position_embeddings": 44,
    "word_embed_proj_dim": 24,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_OPT = {
    "before_tied": {},
    "after_projected": {"do_layer_norm_before": False, "word_embed_proj_dim": 10},
    "untied_odd_head": {"hidden_size": 21, "num_attention_heads": 3, "tie_word_embeddings": False},
    "no_biases_plain_norms": {
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "activation_function": "gelu",
    },
    "no_final_norm_projected": {
        "_remove_final_layer_norm": True,
        "word_embed_proj_dim": 32,
        "tie_word_embeddings": False,
    },
}
_GPT_NEO_SHAPE = {
    "vocab_size": VOCAB,
    "num_layers": 4,
    "hidden_size": 24,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 6,
    "max_position_embeddings": 44,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GPT_NEO = {
    "alternating_tied": {},
    "mixed_untied_odd_head": {
        "num_heads": 8,
        "num_layers": 3,
        "attention_types": [[["local"], 2], [["global"], 1]],
        "tie_word_embeddings": False,
        "intermediate_size": 20,
        "activation_function": "gelu",
    },
}
_EXPERTS = _SHAPE | {"num_hidden_layers": 2, "num_experts_per_tok": 2, "hidden_act": "silu"}
_MIXTRAL_SHAPE = _EXPERTS | {"num_local_experts": 4, "intermediate_size": 20}
_MIXTRAL = {
    "grouped": {},
    "window_odd_head_tied": {
        "sliding_window": 6,
        "head_dim": 10,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "rope_scaling": LINEAR,
    },
}
_OLMOE_SHAPE = _EXPERTS | {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 10}
_OLMOE = {
    "mha": {"num_key_value_heads": 4, "rope_scaling": LLAMA3},
    "grouped_clip_biases_sum_to_one": {
        "clip_qkv": 0.7,
        "norm_topk_prob": True,
        "attention_bias": True,
        "rope_scaling": YARN,
    },
}
_QWEN_SHAPE = _EXPERTS | {"num_experts": 6, "moe_intermediate_size": 14, "num_hidden_layers": 3}
_QWEN2_MOE_SHAPE = _QWEN_SHAPE | {"shared_expert_intermediate_size": 22}
_QWEN2_MOE = {
    "mha_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "dense_first_windows_sum_to_one": {
        "num_hidden_layers": 2,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 3,
        "qkv_bias": False,
        "rope_scaling": YARN,
    },
    "every_second_layer": {
        "decoder_sparse_step": 2,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 3,
    },
}
_QWEN3_MOE = {
    "odd_head_sum_to_one": {"head_dim": 10, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "dense_first_window_biases": {
        "head_dim": 6,
        "mlp_only_layers": [0],
        "use_sliding_window": True,
        "sliding_window": 6,
        "attention_bias": True,
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": True,
    },
    "dense_between": {"mlp_only_layers": [1], "norm_topk_prob": True},
}
_DEEPSEEK_SHAPE = _EXPERTS | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "q_lora_rank": None,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 10,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
_DEEPSEEK_V2 = {
    "lite_yarn": {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "q_rank_groups_scaled_biases": {
        "q_lora_rank": 9,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "attention_bias": True,
    },
    "unlike_mscales_no_dense_tied": {
        "rope_scaling": MSCALE_YARN,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
        "tie_word_embeddings": True,
    },
}
_FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "llama": ("LlamaForCausalLM", _SHAPE, _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", _SHAPE, _QWEN2),
    "qwen3": ("Qwen3ForCausalLM", _SHAPE, _QWEN3),
    "gemma2": ("Gemma2ForCausalLM", _SHAPE, _GEMMA2),
    "opt": ("OPTForCausalLM", _OPT_SHAPE, _OPT),
    "gpt_neo": ("GPTNeoForCausalLM", _GPT_NEO_SHAPE, _GPT_NEO),
    "mixtral": ("MixtralForCausalLM", _MIXTRAL_SHAPE, _MIXTRAL),
    "olmoe": ("OlmoeForCausalLM", _OLMOE_SHAPE, _OLMOE),
    "qwen2_moe": ("Qwen2MoeForCausalLM", _QWEN2_MOE_SHAPE, _QWEN2_MOE),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _QWEN_SHAPE, _QWEN3_MOE),
    "deepseek_v2": ("DeepseekV2ForCausalLM", _DEEPSEEK_SHAPE, _DEEPSEEK_V2),
}
CASES = [f"{family}-{case}" for family, (_, _, cases) in _FAMILIES.items() for case in cases]


def fields_of(name: str) -> dict[str, Any]:
    """config.json's fields of a case, as "gemma2-no_caps"."""
    family, case = name.split("-")
    architecture, shape, cases = _FAMILIES[family]
    own = {"architectures": [architecture], "model_type": family}
    return copy.deepcopy(own | shape | cases[case])


def decodes_alike(name: str) -> bool:
    """Whether both sides mean the same by a cache: not with "dynamic" rope.

    There transformers keeps keys turned by frequencies of shorter texts; ours are fixed per row.
    """
    return "dynamic" not in name
