"""Families with experts: sizes, the configs they refuse, and folders with one tensor per expert."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

import moejax as mj
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import hf
from moejax.io.load import load_any, save_any
from moejax.models.families import by_architecture, by_name
from moejax.models.flops import active_params, num_params
from tests.parity.cases import fields_of
from tests.tiny_llama import tensors_of, write_llama

# All, as the safetensors files on the hub count them, and active ones in billions, as the papers
# and model cards round them (embeddings included, as here, or not: DeepSeek's and Qwen's differ).
PARAMETERS = {
    "mixtral-8x7b": (46_702_792_704, 12.9),
    "mixtral-8x22b": (140_620_634_112, 39.2),
    "olmoe-1b-7b": (6_919_161_856, 1.3),
    "qwen1.5-moe-a2.7b": (14_315_784_192, 2.7),
    "qwen2-57b-a14b": (57_408_658_944, 14.2),
    "qwen3-30b-a3b": (30_532_122_624, 3.4),
    "qwen3-235b-a22b": (235_093_634_560, 22.2),
    "deepseek-v2-lite": (15_706_484_224, 2.7),
    "deepseek-v2": (235_741_434_880, 21.4),
    "deepseek-v2.5": (235_741_434_880, 21.4),
}
OF = {
    "mixtral": "mixtral",
    "olmoe": "olmoe",
    "qwen1.5": "qwen2_moe",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "deepseek": "deepseek_v2",
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_its_model_s_parameters(name):
    config = by_name(OF[name.split("-")[0]]).presets[name]
    total, active_billions = PARAMETERS[name]
    assert num_params(config) == total
    assert round(active_params(config) / 1e9, 1) == active_billions


CASES = ("mixtral-grouped", "qwen2_moe-dense_first_windows_sum_to_one", "deepseek_v2-lite_yarn")


def write(name, folder, dtype=np.float32, max_shard_bytes=1 << 30):
    tensors = {n: t.astype(dtype) for n, t in tensors_of(fields_of(name)).items()}
    return write_llama(folder, fields_of(name), tensors, max_shard_bytes)


@pytest.mark.parametrize("name", CASES)
def test_shards_in_bfloat16_come_back_bit_for_bit(name, tmp_path):
    loaded = load_any(write(name, tmp_path / "in", ml_dtypes.bfloat16, 20_000))
    assert {leaf.dtype.name for leaf in tree.flatten(loaded.params).values()} == {"bfloat16"}
    hf.export_folder(tmp_path / "out", loaded, max_shard_bytes=20_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    again = load_any(tmp_path / "out")
    assert tree.diff(again.params, loaded.params) == []
    assert again.config == loaded.config


def test_every_expert_lies_in_its_layer_s_stack(tmp_path):
    fields = fields_of("qwen2_moe-dense_first_windows_sum_to_one")
    tensors = tensors_of(fields)
    params = load_any(write_llama(tmp_path, fields, tensors)).params
    experts = params["layers"]["1"]["moe"]["experts"]["w_down"]
    for expert in range(6):
        stored = tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]
        assert np.array_equal(experts[0, expert], stored.T)
    assert np.array_equal(
        params["layers"]["0"]["mlp"]["w_up"][0], tensors["model.layers.0.mlp.up_proj.weight"].T
    )


def test_an_expert_that_is_missing_or_one_too_many_is_named(tmp_path):
    fields = fields_of("mixtral-grouped")
    tensors = tensors_of(fields)
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    fewer = {n: t for n, t in tensors.items() if n != name.format(3)}
    more = tensors | {name.format(4): tensors[name.format(3)]}
    for folder, found, words in (
        ("fewer", fewer, f"tensor {name.format(3)} is missing"),
        ("more", more, f"tensor {name.format(4)} has no place"),
    ):
        with pytest.raises(InputError, match=words):
            load_any(write_llama(tmp_path / folder, fields, found))


def test_the_default_format_is_what_holds_the_model(tmp_path):
    model = mj.load(write("mixtral-grouped", tmp_path / "in"))
    model.save(tmp_path / "out")
    assert tree.diff(mj.load(tmp_path / "out").params, model.params) == []
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"noise": True}, "noise"),
        ({"soft_cap": 3.0}, "soft_cap"),
        ({"weighting": "scores"}, "weighting"),
        ({"scale": 2.0}, "scale"),
        ({"expert_ffn": 8}, "expert_ffn"),
    ],
)
def test_experts_that_the_class_cannot_be_are_not_exported(change, named, tmp_path):
    loaded = load_any(write("mixtral-grouped", tmp_path / "in"))
    moe = dataclasses.replace(loaded.config.moe, **change)
    other = dataclasses.replace(loaded.config, moe=moe)
    assert not hf.has_class(other)
    with pytest.raises(InputError, match=f"MixtralForCausalLM has no place for moe.*{named}"):
        save_any(dataclasses.replace(loaded, config=other), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_acts_in_training_only_does_not_hinder_export():
    config = by_name("mixtral").presets["mixtral-8x7b"]
    moe = dataclasses.replace(config.moe, balance="cv_squared", z_weight=0.1, jitter=0.1)
    assert hf.has_class(dataclasses.replace(config, moe=moe))


REFUSED = [
    ("qwen2_moe-mha_tied", {"mlp_only_layers": [3]}, r"\[3\] make \[\] of 3 layers dense"),
    ("qwen3_moe-odd_head_sum_to_one", {"decoder_sparse_step": 4}, r"\[0, 1, 2\] of 3 layers dense"),
    ("qwen3_moe-odd_head_sum_to_one", {"num_experts": None}, "lacks num_experts"),
    ("qwen2_moe-mha_tied", {"moe_intermediate_size": None}, "lacks moe_intermediate_size"),
    ("mixtral-grouped", {"num_experts_per_tok": 5}, "top_k=5 is more than num_experts=4"),
    ("olmoe-mha", {"clip_qkv": -1.0}, "clip must be above 0, got -1.0"),
    ("deepseek_v2-lite_yarn", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not one"),
    ("deepseek_v2-lite_yarn", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not read"),
    ("deepseek_v2-lite_yarn", {"moe_layer_freq": 2}, "moe_layer_freq 2 is not read, only 1"),
    ("deepseek_v2-lite_yarn", {"mlp_bias": True}, "mlp_bias True is not read, only False"),
    ("deepseek_v2-lite_yarn", {"kv_lora_rank": None}, "lacks kv_lora_rank"),
    ("deepseek_v2-lite_yarn", {"first_k_dense_replace": 3}, "got 3 of 3 layers"),
    ("deepseek_v2-lite_yarn", {"qk_rope_head_dim": 3}, "rope_size must be even, got 3"),
    (
        "deepseek_v2-q_rank_groups_scaled_biases",
        {"topk_group": 1},
        "top_groups=1 of 2 experts each hold 2, fewer than the 3",
    ),
]


@pytest.mark.parametrize(("name", "change", "words"), REFUSED)
def test_a_config_that_cannot_be_read_is_one_line(name, change, words):
    fields = fields_of(name) | change
    with pytest.raises(InputError, match=words):
        by_architecture(fields["architectures"][0]).config_from_hf(fields)


def test_deepseek_divides_by_the_sum_in_place_of_the_factor():
    # As in the code released with the weights: transformers 5.23 does not read norm_topk_prob.
    fields = fields_of("deepseek_v2-q_rank_groups_scaled_biases")
    read = by_name("deepseek_v2").config_from_hf
    plain, divided = (read(fields | {"norm_topk_prob": on}).moe for on in (False, True))
    assert (plain.weighting, plain.scale) == ("scores", 2.5)
    assert (divided.weighting, divided.scale) == ("renormalized", 1.0)


def test_either_name_of_the_number_of_experts_is_read():
    fields = fields_of("qwen3_moe-odd_head_sum_to_one")
    renamed = {k: v for k, v in fields.items() if k != "num_experts"}
    read = by_name("qwen3_moe").config_from_hf
    assert read(renamed | {"num_local_experts": fields["num_experts"]}) == read(fields)
