"""launch.wise as a user runs it: ends copied, streamed equal to in memory, refusals in one line."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from launch.mixing import Plan, mixed_model
from moejax.core import tree
from moejax.io import lineage
from moejax.io.load import load_any, save_any
from moejax.io.loaded import Loaded
from moejax.io.tokenizer import Tokenizer
from moejax.methods.interpolate import Deltas, interpolate
from moejax.models import transformer
from moejax.models.config import ModelConfig
from tests import commands
from tests.tiny_tokenizer import gguf_fields

WEIGHTS = "model.safetensors"
run = functools.partial(commands.run, "wise")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """a, b, c: three points of one run; other: of another run; deep: one layer more."""
    path = tmp_path_factory.mktemp("wise")
    tokenizer = Tokenizer.from_gguf_metadata(gguf_fields())
    config = ModelConfig("llama", tokenizer.vocab_size, 2, 16, 24, 2, 1, 8, max_position=64)
    deep = ModelConfig("llama", tokenizer.vocab_size, 3, 16, 24, 2, 1, 8, max_position=64)
    for seed, (name, base) in enumerate([("a", "1"), ("b", "1"), ("c", "1"), ("other", "2")]):
        params = jax.tree.map(np.asarray, transformer.init_params(config, jax.random.key(seed)))
        history = lineage.append((), "import", [{"path": "base", "xxh3": base}])
        save_any(Loaded(params, config, tokenizer, lineage=history), path / name, "hf")
    params = transformer.init_params(deep, jax.random.key(0))
    save_any(Loaded(params, deep, tokenizer), path / "deep", "hf")
    save_any(load_any(path / "a"), path / "half", "hf", dtype="bfloat16")
    save_any(load_any(path / "a"), path / "own", "orbax")
    return path


def test_a_mixture_from_the_command_line(folder, tmp_path):
    early, late = f"--early={folder / 'a'}", f"--late={folder / 'b'}"
    done = run(early, late, "--delta=0.3", f"--out={tmp_path / 'mixed'}")
    assert done.returncode == 0, done.stderr
    mixed, models = load_any(tmp_path / "mixed"), [load_any(folder / n) for n in "ab"]
    wanted = interpolate(models[0].params, models[1].params, mixed.config, Deltas(0.3))
    for path, leaf in tree.flatten(mixed.params).items():
        np.testing.assert_allclose(leaf, tree.flatten(wanted)[path], rtol=1e-6, atol=1e-7)
    operation = mixed.lineage[-2]
    assert operation["op"] == "interpolate" and operation["args"]["deltas"]["delta"] == 0.3
    assert [i["xxh3"] for i in operation["inputs"]] == [
        lineage.hash_path(folder / name) for name in "ab"
    ]
    again = run(early, late, f"--out={tmp_path / 'mixed'}")
    assert again.returncode == 2 and "exists" in again.stderr


@pytest.mark.parametrize(("delta", "end"), [(0.0, "b"), (1.0, "a")])
def test_the_ends_are_copied_byte_for_byte(folder, tmp_path, delta, end):
    names = [str(folder / name) for name in "ab"]
    models = [load_any(name, abstract=True) for name in names]
    save_any(mixed_model(models, names, Plan("wise", Deltas(delta)), whole=False), tmp_path / "m")
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == (folder / end / WEIGHTS).read_bytes()


@pytest.mark.parametrize("method", ["wise", "slerp", "mean", "ema", "task", "ties", "dare"])
def test_streamed_equals_in_memory(folder, tmp_path, method):
    names = [str(folder / name) for name in ("ab" if method in ("wise", "slerp") else "abc")]
    rules = Deltas(0.5, (("**/mlp/**", 0.2),), layers=(0.0, 1.0)) if method == "wise" else Deltas()
    plan = Plan(method, rules, density=0.5)
    whole = mixed_model([load_any(name) for name in names], names, plan, whole=True)
    streamed = mixed_model([load_any(n, abstract=True) for n in names], names, plan, whole=False)
    save_any(streamed, tmp_path / "m")
    found, wanted = tree.flatten(load_any(tmp_path / "m").params), tree.flatten(whole.params)
    if method == "dare":  # draws go by a tensor's name, which is Hugging Face's there
        assert found.keys() == wanted.keys()
        return
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_our_own_format_goes_in_and_out(folder, tmp_path):
    done = run(
        f"--early={folder / 'own'}", f"--late={folder / 'b'}", "--delta=1", "--format=orbax",
        f"--out={tmp_path / 'm'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not tree.diff(load_any(tmp_path / "m").params, load_any(folder / "a").params)


BAD = {
    "another run": (["--early=other", "--late=b"], "different imports"),
    "another depth": (["--early=deep", "--late=b"], "num_layers=3"),
    "another dtype": (["--early=half", "--late=b"], "bfloat16"),
    "delta above one": (["--early=a", "--late=b", "--delta=1.5"], "allow_extrapolation"),
    "no late": (["--early=a"], "--early and --late"),
    "no base": (["--method=ties", "--models=b"], "--base"),
    "one model": (["--method=mean", "--models=b"], "at least two"),
    "a pattern of nothing": (["--early=a", "--late=b", "--deltas=x/**=1"], "fits no path"),
    "no number": (["--early=a", "--late=b", "--deltas=**=x"], "not a number"),
    "rules for a mean": (["--method=mean", "--models=a,b", "--exclude=**"], "by place"),
    "a broken shard": (["--early=broken", "--late=b"], "broken or truncated"),
    "nothing there": (["--early=nowhere", "--late=b"], "nowhere is missing"),
}


# All cases in one process: each would pay for the imports anew.
_EACH = """
import json, sys
from absl import flags
from absl.testing import flagsaver
from launch import wise

def said(given):
    with flagsaver.flagsaver():
        try:
            flags.FLAGS(["wise", "--out=bad", *given])
            wise.main([])
        except ValueError as error:
            return str(error)
    return "nothing was refused"

print(json.dumps({name: said(given) for name, (given, _) in json.loads(sys.argv[1]).items()}))
"""


@pytest.fixture(scope="module")
def refusals(folder) -> dict[str, str]:
    save_any(load_any(folder / "a"), folder / "broken", "hf")
    whole = (folder / "broken" / WEIGHTS).read_bytes()
    (folder / "broken" / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    done = subprocess.run(
        [sys.executable, "-c", _EACH, json.dumps(BAD)],
        cwd=folder,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(commands.ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(folder, refusals, case):
    assert BAD[case][1] in refusals[case]
    assert "\n" not in refusals[case]
    assert not (folder / "bad").exists() and not list(folder.glob(".bad*"))


def test_an_unrelated_model_may_be_asked_for(folder, tmp_path):
    done = run(
        f"--early={folder / 'other'}", f"--late={folder / 'b'}", "--allow_unrelated",
        f"--out={tmp_path / 'm'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "m" / "lineage.json").read_text())[0]["op"] == "import"
