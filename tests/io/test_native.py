"""Our own folder holds any model, and gives it back bit for bit."""

import json
import shutil

import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io.load import License, Loaded, load_any, save_any
from moejax.io.tokenizer import Tokenizer
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig
from moejax.ops.rope import RopeConfig
from tests.tiny_llama import random_params
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
