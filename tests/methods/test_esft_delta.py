"""Deltas: in and out bit for bit, several on one base, the reference's adapter folders."""

from __future__ import annotations

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import lineage
from moejax.methods import adapter_files, esft_delta
from moejax.methods.esft_delta import Adapters
from moejax.methods.expert_config import ExpertConfig
from moejax.models import transformer
from tests.methods.test_expert_scores import XFT, config_of

DEEPSEEK = config_of("deepseek_v2-lite_yarn")
CHOSEN = {
    "experts": ExpertConfig({1: (3, 0), 2: (5,)}),
    "shared": ExpertConfig({1: (2,)}, shared_experts=True),
    "all_parts": ExpertConfig({2: (1,)}, shared_experts=True, non_expert_modules=True),
}


def params_of(config, seed=0, dtype=ml_dtypes.bfloat16):
    return jax.tree.map(
        lambda x: np.asarray(x).astype(dtype), transformer.init_params(config, jax.random.key(seed))
    )


@pytest.mark.parametrize("config", [DEEPSEEK, XFT], ids=["deepseek", "xft"])
@pytest.mark.parametrize("which", CHOSEN)
def test_insert_and_extract_are_inverse_also_through_a_folder(config, which, tmp_path):
    chosen = CHOSEN[which]
    if config is XFT:
        experts = {n - 1: tuple(1 + e % 4 for e in ids) for n, ids in chosen.experts.items()}
        chosen = dataclasses.replace(chosen, experts=experts)
    base, other = params_of(config), params_of(config, 1)
    delta = esft_delta.extract(other, config, chosen)
    adapter_files.write(tmp_path / "d", delta, config)
    again = adapter_files.read(tmp_path / "d", config)
    tuned = esft_delta.insert(base, config, again)
    assert tree.diff(esft_delta.insert(base, config, delta), tuned) == []
    back = esft_delta.extract(tuned, config, chosen)
    for path, value in {**delta.stacks, **delta.leaves}.items():
        found = {**back.stacks, **back.leaves}[path]
        assert found.tobytes() == value.tobytes(), path
    original = esft_delta.extract(base, config, chosen)
    assert tree.diff(esft_delta.insert(tuned, config, original), base) == []
    assert tree.diff(params_of(config), base) == []  # never changed in place


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_folder_of_the_reference(prefix, tmp_path):
    """expert_cfg.json and torch's tensors, [out, in]; the first ones without "model."."""
    values, name = {}, "layers.{}.mlp.experts.{}.{}_proj.weight"
    rng = np.random.default_rng(0)
    for layer, expert in ((1, 3), (1, 0), (2, 5)):
        for part, shape in (("gate", (10, 24)), ("up", (10, 24)), ("down", (24, 10))):
            values[prefix + name.format(layer, expert, part)] = rng.random(shape, np.float32)
    width = DEEPSEEK.moe.expert_ffn
    values = {n: v[:width] if "down" not in n else v[:, :width] for n, v in values.items()}
    save_file({n: np.ascontiguousarray(v) for n, v in values.items()}, tmp_path / "a.safetensors")
    config = {"experts": {"1": [3, 0], "2": [5]}, "shared_experts": False}
    (tmp_path / "expert_cfg.json").write_text(json.dumps(config))
    delta = adapter_files.read(tmp_path, DEEPSEEK)
    tuned = esft_delta.insert(params_of(DEEPSEEK, dtype=np.float32), DEEPSEEK, delta)
    stack = tree.flatten(tuned)["layers/1/moe/experts/w_down"]
    np.testing.assert_array_equal(stack[0, 3], values[prefix + name.format(1, 3, "down")].T)
    np.testing.assert_array_equal(stack[1, 5], values[prefix + name.format(2, 5, "down")].T)
    adapter_files.write(tmp_path / "ours", delta, DEEPSEEK)
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert {n.removeprefix("model.") for n in written} == {n.removeprefix("model.") for n in values}
    for n, value in values.items():
        np.testing.assert_array_equal(written["model." + n.removeprefix("model.")], value)
    assert json.loads((tmp_path / "ours" / "expert_cfg.json").read_text())["experts"]["1"] == [3, 0]


def test_adapters_take_turns_on_one_base():
    base = params_of(XFT, dtype=np.float32)
    others = {name: params_of(XFT, seed, np.float32) for seed, name in ((1, "a"), (2, "b"))}
    picks = {"a": ExpertConfig({0: (1, 2), 1: (4,)}), "b": ExpertConfig({0: (2,), 1: (3,)})}
    deltas = {n: esft_delta.extract(others[n], XFT, picks[n]) for n in picks}
    adapters = Adapters(base, XFT)
    for name, delta in deltas.items():
        adapters.add(name, delta)
    for name in ("a", "b", "a", None, "b", "b", None):
        wanted = base if name is None else esft_delta.insert(base, XFT, deltas[name])
        assert tree.diff(jax.device_get(adapters.use(name)), wanted) == []
    with pytest.raises(InputError, match="no adapter 'c': there are a, b"):
        adapters.use("c")


def test_adapters_of_layers_that_lie_apart():
    base, other = params_of(DEEPSEEK, dtype=np.float32), params_of(DEEPSEEK, 1, np.float32)
    for chosen in CHOSEN.values():
        delta = esft_delta.extract(other, DEEPSEEK, chosen)
        adapters = Adapters.of(transformer.split_layers(base), DEEPSEEK, {"d": delta})
        for name in ("d", None, "d"):
            wanted = esft_delta.insert(base, DEEPSEEK, delta) if name else base
            found = jax.device_get(adapters.use(name))
            jax.tree.map(np.testing.assert_array_equal, found, transformer.split_layers(wanted))


def test_a_delta_of_another_base_is_refused():
    base, other = params_of(XFT), params_of(XFT, 1)
    delta = esft_delta.extract(other, XFT, ExpertConfig({0: (1,)}))
    delta = dataclasses.replace(delta, base_sha256=lineage.hash_params(other))
    esft_delta.check_base(other, delta, "d")
    with pytest.raises(InputError, match="d was trained from a base with sha256"):
        esft_delta.check_base(base, delta, "d")
    adapters = Adapters(base, XFT, lineage.hash_params(base))
    with pytest.raises(InputError, match="adapter d was trained from a base"):
        adapters.add("d", delta)


def test_a_delta_that_is_cut_or_too_large_is_refused(tmp_path):
    delta = esft_delta.extract(params_of(DEEPSEEK), DEEPSEEK, CHOSEN["experts"])
    adapter_files.write(tmp_path / "d", delta, DEEPSEEK)
    path = tmp_path / "d" / "expert_cfg.json"
    for ids, words in (([3, 0, 1], "lacks tensor"), ([3], "does not name, tensor")):
        path.write_text(json.dumps({"experts": {"1": ids, "2": [5]}}))
        with pytest.raises(InputError, match=words):
            adapter_files.read(tmp_path / "d", DEEPSEEK)
