"""Families as data: presets are the models they are called after; configs go both ways, or fail."""

import dataclasses
import json
import math

import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import hf
from moejax.io.load import load_any
from moejax.models.config import (
    AttentionConfig,
    EmbeddingConfig,
    ModelConfig,
    NormConfig,
)
from moejax.models.families import FAMILIES, by_architecture, by_name
from moejax.models.flops import num_params
from moejax.models.params import abstract_params
from tests.parity.cases import CASES, fields_of
from tests.tiny_llama import tensors_of, write_llama

# As the model cards, or the safetensors files on the hub, count them.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "deepseek-coder-1.3b": 1_346_471_936,
    "deepseek-coder-6.7b": 6_740_512_768,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-3b": 3_085_938_688,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984,
    "gpt-neo-125m": 125_198_592,
    "gpt-neo-1.3b": 1_315_575_808,
    "gpt-neo-2.7b": 2_651_307_520,
}
# config.json as the hub has it, dtype and special tokens left out.
HUB = {
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "deepseek-coder-1.3b": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "max_position_embeddings": 16384,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "rope_theta": 100000,
        "tie_word_embeddings": False,
        "vocab_size": 32256,
    },
    "deepseek-v2.5": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 1536,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 128,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 60,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 16.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "v_head_dim": 128,
        "vocab_size": 102400,
    },
    "deepseek-coder-6.7b": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 16384,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "rope_theta": 100000,
        "tie_word_embeddings": False,
        "vocab_size": 32256,
    },
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "initializer_range": 0.02,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "opt-350m": {
        "architectures": ["OPTForCausalLM"],
        "activation_function": "relu",
        "attention_dropout": 0.0,
        "do_layer_norm_before": False,
        "dropout": 0.1,
        "ffn_dim": 4096,
        "hidden_size": 1024,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": 2048,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "prefix": "</s>",
        "vocab_size": 50272,
        "word_embed_proj_dim": 512,
    },
    "gpt-neo-1.3b": {
        "architectures": ["GPTNeoForCausalLM"],
        "activation_function": "gelu_new",
        "attention_layers": ["global", "local"] * 12,
        "attention_types": [[["global", "local"], 12]],
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 2048,
        "num_heads": 16,
        "num_layers": 24,
        "vocab_size": 50257,
        "window_size": 256,
    },
}
PRESETS = {name: config for family in FAMILIES for name, config in family.presets.items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_its_model_s_parameters(name):
    assert num_params(PRESETS[name]) == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_both_kinds_of_config_file(name):
    config = PRESETS[name]
    fields = json.loads(json.dumps(hf.config_fields(config)))
    assert hf.read_config(fields, name) == config
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("name", HUB)
def test_a_preset_is_what_the_hub_s_config_says(name):
    assert hf.read_config(HUB[name], name) == PRESETS[name]


@pytest.mark.parametrize("name", CASES)
def test_a_case_survives_both_kinds_of_config_file(name):
    config = hf.read_config(fields_of(name), name)
    fields = json.loads(json.dumps(hf.config_fields(config)))
    assert hf.read_config(fields, name) == config
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_has_one_place_and_every_leaf_is_filled(name):
    config = hf.read_config(fields_of(name), name)
    table = by_name(config.family).name_table(config)
    assert len({weight.hf_name for weight in table}) == len(table)
    heads = [weight for weight in table if weight.hf_name == "lm_head.weight"]
    assert len(heads) == (0 if config.tie_embeddings else 1)
    assert len({(weight.path, weight.index) for weight in table}) == len(table)
    assert {weight.path for weight in table} == tree.flatten(abstract_params(config)).keys()
    assert sum(math.prod(weight.hf_shape) for weight in table) == num_params(config)


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("qwen2-grouped_tied", {"layer_types": ["full_attention"]}, "names 1 layers, num_hid.* 3"),
        (
            "qwen2-grouped_tied",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "sliding_attention layers, but sliding_window is None",
        ),
        ("qwen2-grouped_tied", {"layer_types": ["linear_attention"] * 3}, "'linear_attention' is"),
        ("qwen2-grouped_tied", {"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ("qwen2-grouped_tied", {"quantization_config": {"bits": 4}}, "weights are quantised"),
        ("qwen3-grouped_odd_head", {"head_dim": 7}, "must be even for rotary positions, got 7"),
        ("qwen3-grouped_odd_head", {"hidden_size": None}, "lacks hidden_size: a qwen3 config"),
        ("gemma2-no_caps", {"use_bidirectional_attention": True}, "only causal models"),
        ("gemma2-no_caps", {"query_pre_attn_scalar": 0}, "scalar must be above 0, got 0"),
        ("gemma2-no_caps", {"attn_logit_softcapping": -1.0}, "soft_cap must be above 0, got -1.0"),
        ("gemma2-no_caps", {"tie_word_embeddings": "no"}, "must be true or false, got 'no'"),
        ("gemma2-no_caps", {"rms_norm_eps": "1e-6"}, "norm_eps must lie between 0 and 1"),
        ("gemma2-no_caps", {"rope_theta": 0}, "theta must be above 0, got 0"),
        ("gemma2-no_caps", {"sliding_window": None}, "but sliding_window is None"),
        ("opt-before_tied", {"word_embed_proj_dim": 0}, "size must be 1 or more, got 0"),
        ("opt-before_tied", {"num_attention_heads": 5}, "hidden_size 24 is not a multiple.* 5"),
        ("opt-before_tied", {"activation_function": "swoosh"}, "'swoosh' is not one"),
        ("gpt_neo-alternating_tied", {"num_layers": 5}, "names 4 layers, num_layers is 5"),
        (
            "gpt_neo-alternating_tied",
            {"attention_types": [[["global", "sparse"], 2]]},
            "'sparse' is neither global nor local",
        ),
        ("llama-yarn", {"rope_scaling": {"rope_type": "yarn"}}, "'yarn' lacks its field 'factor'"),
        ("llama-yarn", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not read"),
        ("llama-yarn", {"architectures": ["RwkvForCausalLM"]}, "'RwkvForCausalLM' is not one"),
        ("llama-yarn", {"num_hidden_layers": "3"}, "num_layers must be a positive integer"),
    ],
)
def test_fields_that_contradict_each_other_are_one_line(name, change, message):
    with pytest.raises(InputError, match=message) as caught:
        hf.read_config(fields_of(name) | change, "here")
    assert "\n" not in str(caught.value) and str(caught.value).startswith(("here: ", "archi"))


@pytest.mark.parametrize("name", ["qwen2-grouped_tied", "gemma2-no_caps", "opt-after_projected"])
def test_tensors_that_do_not_fit_are_named(name, tmp_path):
    fields = fields_of(name)
    tensors = tensors_of(fields)
    some = next(key for key in tensors if key.endswith("q_proj.weight"))

    def read(changed):
        return load_any(write_llama(tmp_path, fields, changed))

    without = {key: value for key, value in tensors.items() if key != some}
    with pytest.raises(InputError, match=f"tensor {some} is missing"):
        read(without)
    with pytest.raises(InputError, match=r"has shape \[2, 2\], config.json asks for \["):
        read(tensors | {some: tensors[some][:2, :2]})
    with pytest.raises(InputError, match="tensor model.extra.weight has no place"):
        read(tensors | {"model.extra.weight": tensors[some]})


def test_masks_of_old_gpt_neo_checkpoints_are_left_out(tmp_path):
    fields = fields_of("gpt_neo-alternating_tied")
    tensors = tensors_of(fields)
    mask = tensors["transformer.ln_f.bias"]
    for i in range(4):
        for name in ("bias", "masked_bias"):
            tensors[f"transformer.h.{i}.attn.attention.{name}"] = mask
    assert load_any(write_llama(tmp_path, fields, tensors)).config.num_layers == 4


@pytest.mark.parametrize(
    "name,change",
    [
        ("llama-grouped_tied", {"attention": AttentionConfig(windows=(7,))}),
        ("llama-grouped_tied", {"norms": NormConfig("layer")}),
        ("qwen2-grouped_tied", {"attention_bias": False}),
        ("opt-before_tied", {"embedding": EmbeddingConfig()}),
        ("gpt_neo-alternating_tied", {"mlp_bias": False}),
    ],
)
def test_what_a_class_of_transformers_cannot_be_is_not_exported_as_it(name, change):
    config = dataclasses.replace(hf.read_config(fields_of(name), name), **change)
    with pytest.raises(InputError, match=f"ForCausalLM has no place for {next(iter(change))}="):
        hf.config_fields(config)


@pytest.mark.parametrize(
    "kind,change,message",
    [
        (AttentionConfig, {"windows": ()}, "0 for all: got ()"),
        (AttentionConfig, {"windows": (-1,)}, "0 for all: got"),
        (AttentionConfig, {"qk_norm": "each"}, "'each' is unknown: use one of none, head, all"),
        (NormConfig, {"kind": "batch"}, "'batch' is unknown: use one of rms"),
        (NormConfig, {"placement": "around"}, "'around' is unknown: use one of pre, post"),
        (EmbeddingConfig, {"positions": "alibi"}, "'alibi' is unknown: use one of rope, learned"),
        (EmbeddingConfig, {"size": 0}, "size must be 1 or more, got 0"),
        (EmbeddingConfig, {"logit_soft_cap": 0.0}, "logit_soft_cap must be above 0, got 0.0"),
    ],
)
def test_parts_of_a_config_that_cannot_be(kind, change, message):
    with pytest.raises(InputError) as caught:
        kind(**change)
    assert message in str(caught.value)


def test_unknown_names_list_what_is_known():
    with pytest.raises(InputError, match="reads LlamaForCausalLM, .*Gemma2ForCausalLM"):
        by_architecture("BloomForCausalLM")
    with pytest.raises(InputError, match="knows llama, .*gemma2"):
        by_name("bloom")
