"""The lines of the README, on a tiny model with a tokenizer of its own."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import moejax as mj
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.precision import TOLERANCE
from moejax.io.loaded import Loaded
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.serve.sampling import SamplingConfig

CONFIG = ModelConfig("llama", 67, 2, 16, 24, 2, 1, 8, max_position=64, initializer_range=0.3)
TOKENS = np.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def model():
    return mj.Model(Loaded(transformer.init_params(CONFIG, jax.random.key(0)), CONFIG))


def relative_gap(a, b):
    return float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / np.max(np.abs(b)))


def test_logits_have_the_documented_shape_and_type(model):
    out = model.logits(TOKENS.tolist())
    assert out.shape == (2, 6, 67) and out.dtype == np.float32


def test_upcycling_changes_no_logit_and_merging_gives_the_model_back(model):
    moe = mj.upcycle(model, experts=4, top_k=3, seed=1)
    assert relative_gap(moe.logits(TOKENS), model.logits(TOKENS)) <= TOLERANCE["float32"]
    dense = mj.merge(moe)
    assert tree.diff(dense.params, model.params) == []
    assert dense.config == model.config
    assert [entry["op"] for entry in dense.lineage] == ["upcycle", "merge"]
    assert model.lineage == () and model.config.moe is None  # nothing was changed in place


def test_plain_sparse_upcycling_too(model):
    moe = mj.upcycle(model, experts=3, top_k=2, weighting="selected")
    assert relative_gap(moe.logits(TOKENS), model.logits(TOKENS)) <= TOLERANCE["float32"]
    assert mj.merge(moe).config == model.config


def test_save_and_load_are_inverse(model, tmp_path):
    moe = mj.upcycle(model, experts=4, top_k=3)
    for name, saved in (("dense", model), ("moe", moe)):
        saved.save(tmp_path / name)
        again = mj.load(tmp_path / name)
        assert again.config == saved.config
        assert tree.diff(again.params, jax.tree.map(np.asarray, saved.params)) == []


@pytest.mark.parametrize(
    "tokens,message",
    [
        ([[0, 67]], r"\[0, 67\), got 0 to 67"),
        ([[-1]], "got -1"),
        ([1, 2], r"\[2\]"),
        ([[0.5]], "float"),
    ],
)
def test_tokens_that_are_none(model, tokens, message):
    with pytest.raises(InputError, match=message):
        model.logits(tokens)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda m: m.generate("hi"), "without a tokenizer"),
        (lambda m: mj.merge(m), "expert"),
        (lambda m: mj.upcycle(m, 4, 5), "top_k=5"),
        (lambda m: mj.upcycle(mj.upcycle(m, 4, 3), 4, 3), "already has 4 experts"),
        (lambda m: mj.load("/no/such/folder"), "missing"),
        (lambda m: SamplingConfig(temperature=-1), "temperature"),
    ],
)
def test_requests_that_cannot_work(model, call, message):
    with pytest.raises(InputError, match=message):
        call(model)


def test_importing_touches_no_device():
    code = (
        "import moejax, moejax.api; from jax._src import xla_bridge as b; "
        "assert not b.backends_are_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_interpolate_gives_the_ends_and_says_what_it_did(model):
    other = mj.Model(Loaded(transformer.init_params(CONFIG, jax.random.key(1)), CONFIG))
    assert not tree.diff(mj.interpolate(other, model, 0.0).params, model.params)
    assert not tree.diff(mj.interpolate(other, model, 1.0).params, other.params)
    half = mj.interpolate(other, model, 0.5, patterns=(("embed/*", 0.0),))
    assert half.lineage[-1]["args"]["deltas"]["delta"] == 0.5
    np.testing.assert_array_equal(half.params["embed"]["tokens"], model.params["embed"]["tokens"])
    with pytest.raises(InputError, match="different configs"):
        mj.interpolate(mj.upcycle(other, 2, 2), model)
