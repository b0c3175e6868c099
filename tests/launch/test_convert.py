"""launch.convert: what it writes, and one line for everything that is wrong with what it reads."""

import errno
import json
import re
import shutil
from collections import namedtuple

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from launch import convert
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic, safetensors
from moejax.io.load import Loaded, load_any, save_any
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig
from tests import commands
from tests.tiny_llama import BASE, random_params, tensors_of, write_llama, write_tokenizer

MOE = ModelConfig("llama", 67, 2, 16, 24, 2, 1, 8, moe=MoEConfig(4, 3))
INDEX = "model.safetensors.index.json"
Usage = namedtuple("Usage", "total used free")


def run(source, target, **more):
    """The launcher's main in this process, as `cli.run` calls it."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["convert", "--source=x", "--target=x"])
    with flagsaver.flagsaver(source=str(source), target=str(target), **more):
        convert.main([])


@pytest.fixture
def source(tmp_path):
    """A sharded folder with a tokenizer."""
    folder = tmp_path / "in"
    folder.mkdir()
    fields = BASE | {"vocab_size": write_tokenizer(folder)}
    return write_llama(folder, fields, tensors_of(fields), max_shard_bytes=40_000)


def edit(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def rewrite(folder, change):
    """Writes the weights again after `change` has worked on them."""
    fields = json.loads((folder / "config.json").read_text())
    read = safetensors.SafetensorsFolder(folder)
    tensors = {name: read.read(name) for name in read.infos}
    change(tensors)
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    write_llama(folder, fields, tensors)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def lie(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def misname(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00009-of-00009.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def spoil(name, value):
    def change(tensors):
        tensors[name].reshape(-1)[3] = value

    return lambda folder: rewrite(folder, change)


def pickled(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BASE))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


Q = "model.layers.1.self_attn.q_proj.weight"
SHARD_1 = "model-00001-of-00003.safetensors"
SHARD = "model-00002-of-00003.safetensors"
BAD_SOURCES = {
    "missing": (shutil.rmtree, "in is missing: name a model folder"),
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], "no config.json, moejax.json or .gguf"),
    "truncated shard": (lambda f: truncate(f / SHARD), f"{SHARD} is broken or truncated at"),
    "shard that is text": (lambda f: (f / SHARD).write_text("<html>"), f"{SHARD} is broken"),
    "missing shard": (lambda f: (f / SHARD).unlink(), f"names {SHARD}, which is missing"),
    "shard of no file": (misname, "names model-00009-of-00009.safetensors, which is missing"),
    "shard outside": (
        lambda f: edit(f / INDEX, weight_map={"a": "../a.safetensors"}),
        "'../a.safetensors', which is not a file of its folder",
    ),
    "index that names another shard": (
        lambda f: lie(f, lambda index: index["weight_map"].update({Q: SHARD_1})),
        f"says that tensor {Q} is in model-00001-of-00003.safetensors, but .* holds it",
    ),
    "index that names no such tensor": (
        lambda f: lie(f, lambda index: index["weight_map"].update({"wing": SHARD})),
        "names tensor wing, which no shard holds",
    ),
    "index that leaves a tensor out": (
        lambda f: lie(f, lambda index: index["weight_map"].pop(Q)),
        f"does not name tensor {Q}, which a shard holds",
    ),
    "index without a map": (lambda f: edit(f / INDEX, weight_map=None), "has no weight_map"),
    "broken index": (lambda f: (f / INDEX).write_text("{"), f"{INDEX} is not JSON"),
    "no weights": (
        lambda f: [p.unlink() for p in f.glob("model*")],
        "neither model.safetensors nor model.safetensors.index.json",
    ),
    "pickled weights": (pickled, r"only pickled weights \(pytorch_model.bin\)"),
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(Q)), f"tensor {Q} is missing"),
    "extra tensor": (
        lambda f: rewrite(f, lambda t: t.update(wing=np.ones(2, np.float32))),
        "tensor wing has no place in the model",
    ),
    "wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({Q: np.ones((24, 23), np.float32)})),
        rf"tensor {Q} has shape \[24, 23\], config.json asks for \[24, 24\]",
    ),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({Q: t[Q].astype(np.float32)})) or _as_int8(f),
        "is I8, not one of F64, F32, F16, BF16",
    ),
    "NaN": (spoil(Q, np.nan), f"tensor {Q} has 1 values that are NaN or infinite"),
    "infinity": (spoil("lm_head.weight", np.inf), "tensor lm_head.weight has 1 values that are"),
    "untied head in a tied model": (
        lambda f: edit(f / "config.json", tie_word_embeddings=True),
        "lm_head.weight differs from the embedding, but config.json ties them",
    ),
    "unknown architecture": (
        lambda f: edit(f / "config.json", architectures=["MambaForCausalLM"]),
        "'MambaForCausalLM' is not one that moejax reads: it reads .*LlamaForCausalLM",
    ),
    "no architecture": (
        lambda f: edit(f / "config.json", architectures=None),
        "must name one architecture",
    ),
    "broken config": (lambda f: (f / "config.json").write_text('{"a"'), "config.json is not JSON"),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "config without a field": (
        lambda f: edit(f / "config.json", hidden_size=None),
        "config.json lacks hidden_size",
    ),
    "config of a wrong type": (
        lambda f: edit(f / "config.json", hidden_size="wide"),
        "a field of config.json has a wrong type",
    ),
    "heads that do not divide": (
        lambda f: edit(f / "config.json", num_attention_heads=5),
        "hidden_size 24 is not a multiple of num_attention_heads 5",
    ),
    "heads that contradict their size": (
        lambda f: edit(f / "config.json", head_dim=8),
        r"q_proj.weight has shape \[24, 24\], config.json asks for \[32, 24\]",
    ),
    "kv heads that do not divide": (
        lambda f: edit(f / "config.json", num_key_value_heads=3),
        "4 heads cannot share 3 key-value heads",
    ),
    "unknown rope": (
        lambda f: edit(f / "config.json", rope_scaling={"rope_type": "longrope", "factor": 2.0}),
        "rope scaling 'longrope' is unknown",
    ),
    "larger tokenizer": (
        lambda f: _smaller_vocabulary(f),
        "tokenizer has ids up to 269, the model embeds only 67 tokens",
    ),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json"),
    "broken generation config": (
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config.json is",
    ),
}


def _as_int8(folder):
    path = folder / safetensors.SINGLE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    shape = header[Q]["shape"]
    header[Q] |= {"dtype": "I8", "shape": [shape[0], shape[1] * 4]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _smaller_vocabulary(folder):
    edit(folder / "config.json", vocab_size=67)
    fields = json.loads((folder / "config.json").read_text())
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    write_llama(folder, fields, tensors_of(fields))


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_source_is_one_line_and_nothing_is_written(case, source, tmp_path, monkeypatch):
    damage, message = BAD_SOURCES[case]
    damage(source)
    monkeypatch.setattr(atomic, "atomic_dir", None)  # not even beside the target
    with pytest.raises(InputError, match=message) as raised:
        run(source, tmp_path / "out" / "model")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir() if path != source] == []


def test_what_is_written_is_the_model(source, tmp_path, capsys):
    run(source, tmp_path / "hf")
    run(tmp_path / "hf", tmp_path / "own", format="orbax")
    run(tmp_path / "own", tmp_path / "again")
    params = load_any(source).params
    for name in ("hf", "own", "again"):
        assert tree.diff(load_any(tmp_path / name).params, params) == [], name
    assert len(load_any(tmp_path / "again").lineage) == 4  # import, three exports
    printed = capsys.readouterr().out
    assert f"{tree.num_params(params):,} in float32" in printed and "written" in printed


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_verify_finds_what_was_written(source, tmp_path, format, capsys, monkeypatch):
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
    run(source, tmp_path / "out", format=format, dtype="bfloat16", verify=True)
    printed = capsys.readouterr().out
    why = "torch is not installed" if format == "hf" else "orbax is read by us"
    assert f"against the source only: {why}" in printed
    assert "largest logit difference from the source in moejax: 0 of" in printed


def test_an_index_of_another_size_is_a_warning(source, caplog):
    lie(source, lambda index: index["metadata"].update(total_size=7))
    params = load_any(source).params
    assert len(caplog.records) == 1
    assert f"take 7 bytes; they take {tree.num_bytes(params)}" in caplog.text


def test_gguf_is_written_and_verified(tmp_path, capsys):
    fields = BASE | {"hidden_size": 32, "intermediate_size": 64}
    source = write_llama(tmp_path / "in", fields, tensors_of(fields))
    run(source, tmp_path / "m.gguf", format="gguf", verify=True)
    printed = capsys.readouterr().out
    assert "as gguf, float32" in printed and "gguf is read by us" in printed
    assert "largest logit difference from the source in moejax: 0 of" in printed
    assert tree.diff(load_any(tmp_path / "m.gguf").params, load_any(source).params) == []
    run(source, tmp_path / "m.gguf", format="gguf", dtype="q8_0", overwrite=True, verify=True)
    gap = re.search(r"\(([0-9.e-]+) relative\)", capsys.readouterr().out)
    assert gap is not None and 0 < float(gap[1]) < 0.05  # 127 steps each way
    with pytest.raises(InputError, match="q8_0 is a type of GGUF files"):
        run(source, tmp_path / "out", dtype="q8_0")
    with pytest.raises(InputError, match="m.gguf exists: choose another or pass --overwrite"):
        run(source, tmp_path / "m.gguf", format="gguf")


def test_describe_reads_no_weight_and_writes_nothing(source, tmp_path, capsys, monkeypatch):
    num_params = tree.num_params(load_any(source).params)
    monkeypatch.setattr(safetensors.SafetensorsFolder, "read", None)
    run(source, tmp_path / "out", describe=True)
    printed = capsys.readouterr().out
    assert re.search(rf"^num_params +{num_params:,}$", printed, re.MULTILINE)
    assert re.search(r"^  upcycle +yes$", printed, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_shards_are_as_small_as_asked_for(source, tmp_path):
    run(source, tmp_path / "out", max_shard_gb=2e-5)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "out" / INDEX).exists()
    assert tree.diff(load_any(tmp_path / "out").params, load_any(source).params) == []
    cases = (({"max_shard_gb": 0.0}, "above 0"), ({"format": "orbax"}, "of --format=hf only"))
    for wrong, message in cases:
        with pytest.raises(InputError, match=message):
            run(source, tmp_path / "no", **{"max_shard_gb": 1.0} | wrong)
    assert not (tmp_path / "no").exists()


def test_a_dry_run_shows_the_plan_and_writes_nothing(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(safetensors.SafetensorsFolder, "read", None)  # no weight may be read
    run(source, tmp_path / "out", dtype="bfloat16", dry_run=True)
    printed = capsys.readouterr().out
    assert "dense: 2 layers, width 24" in printed and "bfloat16" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_overwriting_is_asked_for(source, tmp_path):
    run(source, tmp_path / "out")
    with pytest.raises(InputError, match="out exists: choose another or pass --overwrite"):
        run(source, tmp_path / "out", dtype="bfloat16")
    assert load_any(tmp_path / "out").params["final_norm"]["scale"].dtype == np.float32
    run(source, tmp_path / "out", dtype="bfloat16", overwrite=True)
    assert load_any(tmp_path / "out").params["final_norm"]["scale"].dtype.name == "bfloat16"
    with pytest.raises(InputError, match="in exists"):
        run(source, source)


def test_a_number_too_large_for_the_type_is_named(source, tmp_path):
    spoil(Q, 1e6)(source)
    with pytest.raises(InputError, match=f"tensor {Q} does not fit float16: use --dtype=bfloat16"):
        run(source, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_a_full_disk_is_seen_before_anything_is_read(source, tmp_path, format, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
    monkeypatch.setattr(safetensors.SafetensorsFolder, "read", None)
    with pytest.raises(InputError, match="but 0.00 GB are free: make room"):
        run(source, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_the_target_as_it_was(source, tmp_path, monkeypatch):
    run(source, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert.stream, "check_all", lambda *rest: None)
    monkeypatch.setattr(safetensors.Entry, "num_bytes", property(lambda self: 0))
    monkeypatch.setattr(safetensors.np, "ascontiguousarray", lambda value: full(value))
    with pytest.raises(InputError, match="no space left while writing .*: make room and run"):
        run(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_an_moe_asks_for_our_own_format(tmp_path):
    save_any(Loaded(random_params(MOE), MOE), tmp_path / "moe", "orbax")
    with pytest.raises(InputError, match="no class in transformers: use --format=orbax"):
        run(tmp_path / "moe", tmp_path / "out")
    run(tmp_path / "moe", tmp_path / "out", format="orbax", dtype="bfloat16")
    assert load_any(tmp_path / "out").config == MOE


def test_exit_codes_and_one_line(tmp_path):
    done = commands.run("convert", f"--source={tmp_path / 'none'}", f"--target={tmp_path / 'out'}")
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and "none is missing" in done.stderr
    done = commands.run("convert", f"--source={tmp_path}", "--target=x", "--format=pickle")
    assert done.returncode == 2 and "pickle" in done.stderr and "hf" in done.stderr
    assert list(tmp_path.iterdir()) == []
