"""GGUF out: what comes back is the model, and transformers computes the same logits from it."""

import json

import numpy as np
import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import gguf_deepseek2, gguf_layout
from moejax.io.gguf_layout import LAYOUTS
from moejax.io.load import Loaded, load_any, save_any
from moejax.models.families import by_name
from moejax.models.params import abstract_params
from tests.tiny_llama import BASE, LLAMA3, fields_of, tensors_of, write_llama, write_tokenizer

SIZES = {
    "vocab_size": 96,
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
YARN = {
    **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    **{"beta_fast": 4.0, "beta_slow": 1.0},
}
DEEPSEEK_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MORE = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "olmoe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "head_dim": None},
        "num_key_value_heads": 4,
    },
    "qwen2": {"tie_word_embeddings": True, "head_dim": 16},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 64, "head_dim": 16},
    "qwen3_moe": EXPERTS | {"norm_topk_prob": True},
    "deepseek_v2": {
        **{"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16},
        **{"v_head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 3},
        **{"moe_intermediate_size": 32, "n_shared_experts": 2, "first_k_dense_replace": 1},
        **{"routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "rope_scaling": DEEPSEEK_YARN},
    },
}
# What transformers' loader does not take from the file (or, of the scalar, is not in one).
NOT_TAKEN = {
    "qwen3": ("head_dim",),
    "gemma2": ("query_pre_attn_scalar",),
    "qwen2_moe": ("moe_intermediate_size", "shared_expert_intermediate_size"),
    "qwen3_moe": ("moe_intermediate_size",),
}
FAMILIES = [layout.family for layout in LAYOUTS]


def tiny(name: str, dtype: str = "float32", **changes) -> Loaded:
    config = by_name(name).config_from_hf(SIZES | MORE.get(name, {}) | changes)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        value = rng.standard_normal(leaf.shape, dtype=np.float32)
        scale = path.endswith("/scale")
        return (1 + value / 4 if scale else value / 8).astype(leaf.dtype)

    return Loaded(tree.map_with_path(draw, abstract_params(config, dtype)), config)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_comes_back_as_the_model(name, tmp_path):
    loaded = tiny(name)
    save_any(loaded, tmp_path / "m.gguf", "gguf")
    again = load_any(tmp_path / "m.gguf")
    found, expected = tree.flatten(again.params), tree.flatten(loaded.params)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        # 1 is added to these norms in float32 and taken off again.
        slack = 1e-6 if path.endswith("/delta") else 0
        assert np.max(np.abs(found[path] - leaf)) <= slack, path
    assert again.config.family == name and again.lineage[-1]["args"]["format"] == "gguf"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_matrices_have_the_type_asked_for_and_vectors_float32(dtype, tmp_path):
    loaded = tiny("llama")
    save_any(loaded, tmp_path / "m.gguf", "gguf", dtype)
    found = tree.flatten(load_any(tmp_path / "m.gguf").params)
    expected = tree.flatten(loaded.params)
    # Half a step of 127 each way, and the step itself is a float16.
    slack = {"float16": 2**-11, "bfloat16": 2**-8, "q8_0": 1 / 254 + 2**-11}[dtype]
    for path, leaf in expected.items():
        worst = np.max(np.abs(found[path].astype(np.float32) - leaf))
        if path.endswith("/scale"):
            assert worst == 0 and found[path].dtype == np.float32
        else:
            assert 0 < worst <= slack * np.max(np.abs(leaf)), path


def test_folder_to_file_to_folder_gives_every_byte_back(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    fields = BASE | {"vocab_size": write_tokenizer(folder)}
    write_llama(folder, fields, tensors_of(fields))
    save_any(load_any(folder, abstract=True), tmp_path / "m.gguf", "gguf")
    save_any(load_any(tmp_path / "m.gguf", abstract=True), tmp_path / "out")
    a, b = load_any(folder), load_any(tmp_path / "out")
    assert a.config == b.config and tree.diff(a.params, b.params) == []
    assert [entry["op"] for entry in b.lineage] == ["import", "export", "export"]
    assert len(b.lineage[0]["inputs"][0]["xxh3"]) == 32
    text = "hello  ab 12\n"
    assert a.tokenizer.encode(text) == b.tokenizer.encode(text)
    assert a.tokenizer.chat_template == b.tokenizer.chat_template
    assert a.tokenizer.special == b.tokenizer.special


@pytest.mark.parametrize("case", ["linear", "attention_bias", "mlp_bias", "grouped_tied"])
def test_options_of_llama_are_carried(case, tmp_path):
    write_llama(tmp_path / "in", fields_of(case), tensors_of(fields_of(case)))
    save_any(load_any(tmp_path / "in"), tmp_path / "m.gguf", "gguf")
    a, b = load_any(tmp_path / "in"), load_any(tmp_path / "m.gguf")
    assert a.config == b.config and tree.diff(a.params, b.params) == []


@pytest.mark.parametrize("case,named", [("dynamic", "rope"), ("gelu", "activation")])
def test_what_gguf_cannot_say_is_refused(case, named, tmp_path):
    write_llama(tmp_path / "in", fields_of(case), tensors_of(fields_of(case)))
    with pytest.raises(InputError, match=f"has no place for {named}="):
        save_any(load_any(tmp_path / "in"), tmp_path / "m.gguf", "gguf")
    with pytest.raises(InputError, match="must be a file named"):
        save_any(load_any(tmp_path / "in"), tmp_path / "m", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


LIMITS = [
    ("qwen3", {"attention_bias": True}, "no qwen3 file with biases of attention"),
    ("gemma2", {"tie_word_embeddings": False}, "no gemma2 file with an output matrix of its own"),
    ("olmoe", {"num_key_value_heads": 2}, "no olmoe file with key-value heads for several heads"),
    ("qwen2_moe", {"tie_word_embeddings": True}, "no qwen2moe file with the embedding as output"),
    ("deepseek_v2", {"q_lora_rank": None}, "no deepseek2 file with no q_lora_rank and other than"),
    ("deepseek_v2", {"n_shared_experts": None}, "no deepseek2 file with no shared experts"),
    ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05: llama.cpp would take it"),
    ("deepseek_v2", {"rope_scaling": DEEPSEEK_YARN | {"mscale": 1.0}}, "no place for rope="),
    ("qwen2", {"rope_scaling": LLAMA3}, "a GGUF file of qwen2 has no place for rope="),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "has no place for later_dense="),
]


@pytest.mark.parametrize(("name", "changes", "words"), LIMITS)
def test_what_llama_cpp_would_not_load_is_refused_before_anything_is_written(
    name, changes, words, tmp_path
):
    with pytest.raises(InputError, match=words) as caught:
        save_any(tiny(name, **changes), tmp_path / "m.gguf", "gguf")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_deepseek_s_groups_are_kept_and_llama_cpp_s_rule_is_warned_of(tmp_path, caplog):
    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    loaded = tiny("deepseek_v2", **groups)
    save_any(loaded, tmp_path / "m.gguf", "gguf")
    assert "each of the 4 groups of experts by its two best" in caplog.text
    assert load_any(tmp_path / "m.gguf").config == loaded.config


def test_early_deepseek_files_hold_keys_and_values_together(tmp_path, monkeypatch):
    def together(config, number, names):
        return [gguf_layout.Place(f"blk.{number}.attn_kv_b.weight", None)]

    loaded = tiny("deepseek_v2")
    with monkeypatch.context() as patched:
        patched.setattr(gguf_layout, "_keys_and_values", together)
        save_any(loaded, tmp_path / "m.gguf", "gguf")
    again = load_any(tmp_path / "m.gguf")
    assert tree.diff(again.params, loaded.params) == []
    early = {"attention.key_length": 48, "attention.value_length": 32, "rope.dimension_count": 16}
    found = gguf_deepseek2.fields_in(early, "here")
    assert found == {"qk_nope_head_dim": 32, "v_head_dim": 32}
    with pytest.raises(InputError, match="has expert_gating_func 2, not softmax"):
        gguf_deepseek2.fields_in(early | {"expert_gating_func": 2}, "here")


@pytest.mark.parametrize("rope", [YARN | {"attention_factor": 1.2}, LLAMA3])
def test_the_numbers_of_rope_come_back(rope, tmp_path):
    loaded = tiny("llama", rope_scaling=rope)
    save_any(loaded, tmp_path / "m.gguf", "gguf")
    assert load_any(tmp_path / "m.gguf").config.rope == loaded.config.rope
    save_any(load_any(tmp_path / "m.gguf", abstract=True), tmp_path / "out")
    assert load_any(tmp_path / "out").config.rope == loaded.config.rope


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "qwen2_moe", "qwen3_moe"])
def test_transformers_reads_the_same_logits(name, tmp_path):
    import torch
    import transformers

    from moejax.io.hf import config_fields

    loaded = tiny(name)
    save_any(loaded, tmp_path / "m.gguf", "gguf")
    fields = config_fields(loaded.config)
    given = {key: fields[key] for key in NOT_TAKEN.get(name, ())}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, **given
    )
    ids = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, 24))
    save_any(loaded, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 96
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32
    )
    with torch.no_grad():
        found = model(torch.tensor(ids)).logits.numpy()
        wanted = expected(torch.tensor(ids)).logits.numpy()
    assert np.max(np.abs(found - wanted)) < 2e-5 * np.max(np.abs(wanted))
