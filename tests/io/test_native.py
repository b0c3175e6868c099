"""Our own folder holds any model, and gives it back bit for bit."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import native_parts, prompt_forms, stream
from moejax.io.load import License, Loaded, load_any, save_any
from moejax.io.tokenizer import Tokenizer
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig
from moejax.ops.rope import RopeConfig
from tests.parity import cases
from tests.tiny_llama import random_params, tensors_of, write_llama
from tests.tiny_tokenizer import gguf_fields

VOCAB = len(gguf_fields()["tokenizer.ggml.tokens"])
DENSE = ModelConfig(
    "llama", VOCAB, 2, 16, 24, 2, 1, 8, rope=RopeConfig(5e5, "linear", 4.0), attention_bias=True
)
MOE = ModelConfig("llama", VOCAB, 2, 16, 24, 2, 1, 8, tie_embeddings=True, moe=MoEConfig(4, 3))


def model(config: ModelConfig, dtype: str = "float32") -> Loaded:
    return Loaded(
        random_params(config, dtype),
        config,
        Tokenizer.from_gguf_metadata(gguf_fields()),
        {"eos_token_id": [2, 0]},
        (),
        "random",
        License("other-1.0", "Do as you like.\n"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "moe"
    save_any(model(MOE), path, "orbax")
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_what_is_saved_comes_back(config, dtype, tmp_path):
    saved = model(config, dtype)
    save_any(saved, tmp_path / "m", "orbax")
    again = load_any(tmp_path / "m")
    assert again.config == config
    assert tree.diff(again.params, saved.params) == []
    assert again.generation == saved.generation and again.license == saved.license
    assert again.tokenizer.encode("hello 12") == saved.tokenizer.encode("hello 12")
    assert [entry["op"] for entry in again.lineage] == ["export"]


@pytest.mark.parametrize("format", ["orbax", "hf", "gguf"])
def test_how_a_model_wants_to_be_asked_goes_along(tmp_path, format):
    """prompt_forms.json: read, kept by what is made of the model, written in every format."""
    config = ModelConfig("llama", VOCAB, 1, 16, 24, 2, 1, 8)
    asked = dataclasses.replace(model(config), prompt_forms={"gsm8k": "chat"})
    path = tmp_path / f"m.{format}"
    save_any(asked, path, format, "float32")
    assert prompt_forms.of(path) == load_any(path).prompt_forms == {"gsm8k": "chat"}
    if format == "orbax":
        (path / "prompt_forms.json").write_text('{"gsm8k": 1}')
        with pytest.raises(InputError, match="an object of task and form is needed"):
            load_any(path)


def test_the_dtype_may_change_on_either_way(folder, tmp_path):
    params = load_any(folder).params
    half = tree.map_with_path(lambda _, leaf: leaf.astype("bfloat16"), params)
    assert tree.diff(load_any(folder, "bfloat16").params, half) == []
    save_any(load_any(folder), tmp_path / "half", "orbax", "bfloat16")
    assert tree.diff(load_any(tmp_path / "half").params, half) == []
    assert json.loads((tmp_path / "half" / "moejax.json").read_text())["dtype"] == "bfloat16"


def test_a_plan_reads_no_weights(folder):
    abstract = load_any(folder, abstract=True).params
    assert tree.diff(abstract, transformer.abstract_params(MOE)) == []


def test_an_moe_has_no_place_in_a_hugging_face_folder(folder, tmp_path):
    with pytest.raises(InputError, match="no class in transformers: use --format=orbax"):
        save_any(load_any(folder), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def edit(folder, change):
    about = json.loads((folder / "moejax.json").read_text())
    change(about)
    (folder / "moejax.json").write_text(json.dumps(about))


def cut(folder):
    file = max((folder / "params").rglob("d/*"), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda f: edit(f, lambda a: a.update(format_version=9)), "format version 9, .* reads 1"),
        (lambda f: edit(f, lambda a: a.pop("config")), "has no model config"),
        (lambda f: edit(f, lambda a: a["config"].update(wings=2)), "wings"),
        (lambda f: edit(f, lambda a: a["config"].update(d_ff=32)), r"\[2, 4, 24, 16\].*32, 16\]"),
        (lambda f: edit(f, lambda a: a["config"].update(mlp_bias=True)), "lacks layers/0/moe"),
        (lambda f: edit(f, lambda a: a["config"].update(moe=None)), "lacks layers/0/mlp"),
        (lambda f: (f / "moejax.json").write_text("{"), "moejax.json is not JSON"),
        (lambda f: shutil.rmtree(f / "params"), "params is missing"),
        (lambda f: (f / "params" / "state" / "_METADATA").unlink(), "params is broken"),
        (cut, "params is broken"),
    ],
)
def test_damage_is_one_line(folder, tmp_path, damage, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy)
    with pytest.raises(InputError, match=message) as raised:
        load_any(copy)
    assert "\n" not in str(raised.value)


PARTS = ["llama-llama3_biases_odd_head", "opt-after_projected", "qwen2_moe-every_second_layer"]
PARTS += ["deepseek_v2-q_rank_groups_scaled_biases"]


@pytest.mark.parametrize("name", PARTS)
def test_folders_are_written_and_read_in_parts(name, tmp_path, monkeypatch):
    """Hugging Face -> ours -> Hugging Face with no leaf in memory, the bytes as they were."""
    monkeypatch.setattr(native_parts, "CHUNK_BYTES", 500)
    monkeypatch.setattr(stream, "PART_BYTES", 300)
    fields = cases.fields_of(name)
    write_llama(tmp_path / "in", fields, tensors_of(fields))
    plain = load_any(tmp_path / "in")
    save_any(load_any(tmp_path / "in", abstract=True), tmp_path / "ours", "orbax")
    ours = load_any(tmp_path / "ours")
    assert tree.diff(ours.params, plain.params) == [] and ours.config == plain.config
    assert [operation["op"] for operation in ours.lineage] == ["import", "export"]
    save_any(load_any(tmp_path / "ours", abstract=True), tmp_path / "out")
    assert tree.diff(load_any(tmp_path / "out").params, plain.params) == []
    # What orbax wrote itself is read in parts too, and cast on the way.
    save_any(plain, tmp_path / "whole", "orbax")
    save_any(load_any(tmp_path / "whole", abstract=True), tmp_path / "half", "orbax", "bfloat16")
    half = tree.map_with_path(lambda _, leaf: leaf.astype("bfloat16"), plain.params)
    assert tree.diff(load_any(tmp_path / "half").params, half) == []


def test_parts_that_are_not_numbers_or_are_gone_are_named(tmp_path):
    fields = cases.fields_of("llama-grouped_tied")
    tensors = tensors_of(fields)
    write_llama(tmp_path / "in", fields, tensors)
    save_any(load_any(tmp_path / "in", abstract=True), tmp_path / "ours", "orbax")
    kept = load_any(tmp_path / "ours", abstract=True)
    for path in (tmp_path / "ours" / "params").rglob("d/*"):
        path.unlink()
    with pytest.raises(InputError, match="broken or incomplete"):
        save_any(kept, tmp_path / "out")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.nan
    write_llama(tmp_path / "nan", fields, tensors)
    with pytest.raises(InputError, match="tensor model.norm.weight has 24 values that are NaN"):
        save_any(load_any(tmp_path / "nan", abstract=True), tmp_path / "out", "orbax")
    assert not (tmp_path / "out").exists()


def test_what_has_no_names_or_is_stored_whole_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(native_parts, "MAX_CHUNK_BYTES", 100)
    fields = cases.fields_of("llama-grouped_tied")
    write_llama(tmp_path / "in", fields, tensors_of(fields))
    save_any(load_any(tmp_path / "in"), tmp_path / "ours", "orbax")
    assert load_any(tmp_path / "ours", abstract=True).tensors is None
