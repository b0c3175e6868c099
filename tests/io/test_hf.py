"""Hugging Face folders: import and export are inverse, bit for bit; everything else is carried."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from moejax.core import tree
from moejax.io import hf
from moejax.io.load import License, Loaded, load_any, save_any
from moejax.io.safetensors import dtype_named
from moejax.io.tokenizer import Tokenizer
from moejax.models import transformer
from moejax.models.config import ModelConfig
from tests.tiny_llama import BASE, CASES, fields_of, random_params, tensors_of, write_llama
from tests.tiny_tokenizer import gguf_fields


def cast(tensors, dtype):
    return {name: value.astype(dtype_named(dtype)) for name, value in tensors.items()}


def read_all(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_import_then_export_gives_every_byte_back(case, dtype, tmp_path):
    tensors = cast(tensors_of(fields_of(case)), dtype)
    loaded = load_any(write_llama(tmp_path / "in", fields_of(case), tensors))
    save_any(loaded, tmp_path / "out")
    assert_same_tensors(read_all(tmp_path / "out"), tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == dtype and config["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_then_import_gives_every_leaf_back(dtype, tmp_path):
    config = ModelConfig("llama", 67, 3, 24, 40, 4, 2, 10, attention_bias=True, mlp_bias=True)
    params = random_params(config, dtype)
    save_any(Loaded(params, config), tmp_path / "out")
    again = load_any(tmp_path / "out")
    assert again.config == config
    assert tree.diff(again.params, params) == []


def test_the_tree_is_the_one_the_decoder_asks_for(tmp_path):
    loaded = load_any(write_llama(tmp_path, BASE, tensors_of(BASE)))
    asked = transformer.abstract_params(loaded.config)
    assert tree.diff(tree.abstract(loaded.params), asked) == []
    assert tree.diff(load_any(tmp_path, abstract=True).params, asked) == []


def test_shards_are_cut_and_joined(tmp_path):
    tensors = tensors_of(BASE)
    whole = load_any(write_llama(tmp_path / "in", BASE, tensors))
    hf.export_folder(tmp_path / "out", whole, max_shard_bytes=20_000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert set(index["weight_map"].values()) == set(shards)
    assert_same_tensors(read_all(tmp_path / "out"), tensors)
    assert tree.diff(load_any(tmp_path / "out").params, whole.params) == []


@pytest.mark.parametrize("stored", ["float32", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_a_dtype_may_be_asked_for(stored, wanted, tmp_path):
    tensors = cast(tensors_of(BASE), stored)
    loaded = load_any(write_llama(tmp_path / "in", BASE, tensors), wanted)
    kept = load_any(tmp_path / "in")
    expected = tree.map_with_path(lambda _, leaf: leaf.astype(dtype_named(wanted)), kept.params)
    assert tree.diff(loaded.params, expected) == []
    save_any(kept, tmp_path / "out", dtype=wanted)
    assert_same_tensors(read_all(tmp_path / "out"), cast(tensors, wanted))


def test_layers_of_several_types_meet_in_the_widest(tmp_path):
    tensors = cast(tensors_of(BASE), "bfloat16")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)
    flat = tree.flatten(load_any(write_llama(tmp_path, BASE, tensors)).params)
    assert flat["layers/0/mlp/w_up"].dtype == np.float32
    assert flat["layers/0/mlp/w_gate"].dtype.name == "bfloat16"


def test_what_old_checkpoints_store_beside_the_weights_is_left_out(tmp_path):
    fields, tensors = fields_of("grouped_tied"), tensors_of(fields_of("grouped_tied"))
    expected = load_any(write_llama(tmp_path / "a", fields, tensors))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    found = load_any(write_llama(tmp_path / "b", fields, tensors))
    assert tree.diff(found.params, expected.params) == []


def test_everything_else_is_carried(tmp_path):
    fields = BASE | {"vocab_size": len(gguf_fields()["tokenizer.ggml.tokens"]), "eos_token_id": 2}
    folder = write_llama(tmp_path / "in", fields, tensors_of(fields))
    tokenizer = Tokenizer.from_gguf_metadata(gguf_fields())
    tokenizer.save(folder)
    generation = {"eos_token_id": [2, 0], "pad_token_id": 0, "temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "README.md").write_text("---\nlicense: other-1.0\n---\n# x\n")
    (folder / "LICENSE").write_text("Do as you like.\n")
    save_any(load_any(folder), tmp_path / "out")

    out = tmp_path / "out"
    assert json.loads((out / "generation_config.json").read_text()) == generation
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [2, 0]
    assert (out / "LICENSE").read_text() == "Do as you like.\n"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    card = (out / "README.md").read_text()
    assert "\nlicense: other-1.0\n" in card and "**import** of `in`" in card

    again = load_any(out)
    assert again.generation == generation
    assert again.license == License("other-1.0", "Do as you like.\n")
    assert [entry["op"] for entry in again.lineage] == ["import", "export"]
    assert again.tokenizer.encode("hello 12") == tokenizer.encode("hello 12")


def test_without_a_tokenizer_or_a_licence_nothing_is_made_up(tmp_path):
    save_any(load_any(write_llama(tmp_path / "in", BASE, tensors_of(BASE))), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "lineage.json", "README.md"}
    assert "license:" not in (tmp_path / "out" / "README.md").read_text()


def test_host_arrays_are_taken_by_jax_without_a_copy(tmp_path):
    loaded = load_any(write_llama(tmp_path, BASE, tensors_of(BASE)))
    for path, leaf in tree.flatten(loaded.params).items():
        assert jax.device_put(leaf).unsafe_buffer_pointer() == leaf.ctypes.data, path
