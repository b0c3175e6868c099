"""A description counts what the config and the headers say, and reads no weight."""

import dataclasses

import numpy as np
import pytest

import moejax.models
from moejax.core.errors import InputError
from moejax.io import describe as io_describe
from moejax.io import safetensors
from moejax.methods.merge import dense_config
from moejax.models.config import ModelConfig
from moejax.models.description import describe_config
from moejax.models.families import FAMILIES
from moejax.moe.config import MoEConfig
from tests.tiny_llama import fields_of, tensors_of, write_llama


def test_a_folder_is_described_without_its_weights(tmp_path, monkeypatch):
    fields = fields_of("grouped_tied")
    tensors = tensors_of(fields)
    write_llama(tmp_path, fields, tensors)
    monkeypatch.setattr(safetensors.SafetensorsFolder, "read", None)
    found = moejax.models.describe(tmp_path)
    read = io_describe.describe(tmp_path)
    assert read.uses == found.uses | {"export to hf": "yes", "export to gguf": "yes"}
    assert found.stored_dtypes == {}
    assert dataclasses.replace(read, stored_dtypes={}, uses=found.uses) == found
    assert read.stored_dtypes == {"float32": found.num_params}
    assert found.num_params == found.active_params == sum(v.size for v in tensors.values())
    # Keys and values of 2 layers, 2 heads of 6, 2 bytes each.
    assert found.kv_cache_bytes_per_token == 2 * 2 * 2 * 6 * 2
    assert found.options["tie_embeddings"] is True and found.uses["upcycle"] == "yes"
    assert found.uses["merge"].startswith("no: ")


def test_headers_that_contradict_the_config_are_named(tmp_path):
    fields = fields_of("plain")
    tensors = tensors_of(fields) | {"model.norm.weight": np.ones(7, np.float32)}
    write_llama(tmp_path, fields, tensors)
    with pytest.raises(InputError, match=r"model.norm.weight has shape \[7\]"):
        io_describe.describe(tmp_path)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_presets_are_described(family):
    for config in family.presets.values():
        found = describe_config(config)
        assert 0 < found.active_params <= found.num_params
        assert (found.active_params < found.num_params) == (config.moe is not None)


def test_deepseek_v2_is_as_its_paper_says():
    """236B parameters, 21B of them active; 576 numbers a token and layer (arXiv 2405.04434)."""
    family = next(family for family in FAMILIES if family.name == "deepseek_v2")
    found = describe_config(family.presets["deepseek-v2"])
    assert round(found.num_params / 1e9) == 236 and round(found.active_params / 1e9) == 21
    assert found.kv_cache_bytes_per_token == 2 * 576 * 60


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        (MoEConfig(4, 2, num_shared=0, weighting="selected"), "yes, but no learned lambda"),
        (MoEConfig(4, 2, num_shared=1), "yes"),
        (MoEConfig(4, 2, expert_ffn=8), "no: "),
    ],
)
def test_merging_is_offered_where_the_method_accepts_the_config(moe, expected):
    config = ModelConfig("llama", 32, 2, 16, 24, 2, 2, 8, moe=moe)
    use = describe_config(config).uses["merge"]
    assert use.startswith(expected)
    if use.startswith("no"):
        with pytest.raises(InputError, match="only an upcycled model"):
            dense_config(config)
    else:
        assert dense_config(config).moe is None


def test_uses_say_what_each_kind_of_model_is_good_for():
    presets = {name: config for family in FAMILIES for name, config in family.presets.items()}
    names = ("opt-125m", "olmoe-1b-7b")
    dense, experts = (io_describe.with_exports(presets[name]).uses for name in names)
    assert dense["esft"].startswith("no: it has no experts") and experts["esft"] == "yes"
    assert dense["upcycle"].startswith("no: its feed-forward layers are not gated")
    assert "no GGUF layout" in dense["export to gguf"] and experts["export to gguf"] == "yes"
    xft = dataclasses.replace(presets["smollm2-135m"], moe=MoEConfig(4, 3))
    assert "no class in transformers" in io_describe.with_exports(xft).uses["export to hf"]
    assert io_describe.with_exports(presets["llama-3.1-8b"]).options["rope"]["kind"] == "llama3"
    assert "kind" not in describe_config(presets["smollm2-135m"]).options["rope"]
    lite = dataclasses.replace(presets["deepseek-v2-lite"], d_ff=1408)
    assert describe_config(lite).uses["merge"].startswith("no: 1 of its layers are dense already")
