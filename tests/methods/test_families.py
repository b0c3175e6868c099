"""Upcycling and merging by family: the dense model's function, and the dense model back."""

import dataclasses

import jax
import numpy as np
import pytest

import moejax as mj
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.precision import TOLERANCE
from moejax.models.transformer import logits
from tests.parity.cases import TOKENS, fields_of
from tests.tiny_llama import tensors_of, write_llama

CASES = ("llama-llama3_biases_odd_head", "qwen2-window_from_layer_1", "gemma2-grouped_tied")


def loaded(name, folder):
    fields = fields_of(name)
    return mj.load(write_llama(folder, fields, tensors_of(fields)))


@pytest.mark.parametrize("name", CASES)
def test_upcycled_is_the_dense_function_and_merged_is_the_dense_model(name, tmp_path):
    dense = loaded(name, tmp_path / "dense")
    wanted = np.asarray(dense.logits(TOKENS))
    moe = mj.upcycle(dense, experts=4, top_k=3)
    gap = np.max(np.abs(np.asarray(moe.logits(TOKENS)) - wanted))
    assert gap < TOLERANCE["float32"] * np.max(np.abs(wanted))
    assert dataclasses.replace(moe.config, moe=None) == dense.config

    moe.save(tmp_path / "moe")
    again = mj.load(tmp_path / "moe")
    assert again.config == moe.config and tree.diff(again.params, moe.params) == []

    merged = mj.merge(again, lam=0.6)
    assert merged.config == dense.config
    assert tree.diff(merged.params, dense.params) == []
    merged.save(tmp_path / "merged")
    assert tree.diff(mj.load(tmp_path / "merged").params, dense.params) == []


@pytest.mark.parametrize("name", ["opt-before_tied", "gpt_neo-alternating_tied"])
def test_a_plain_feed_forward_layer_cannot_be_upcycled(name, tmp_path):
    with pytest.raises(InputError, match="experts are gated feed-forward layers"):
        mj.upcycle(loaded(name, tmp_path), experts=4, top_k=3)


def test_gradients_reach_every_leaf_of_a_sandwich(tmp_path):
    """Norms after a branch scale it: were one left out, its gradient would be zero."""
    model = loaded("gemma2-grouped_tied", tmp_path)

    def loss(params):
        return logits(params, model.config, TOKENS[:, :9]).std()

    for path, leaf in tree.flatten(jax.jit(jax.grad(loss))(model.params)).items():
        assert float(abs(leaf).max()) > 0, path
