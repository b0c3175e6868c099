"""LoRA: the base at the start, merged equals attached, gradients of the factors alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods import lora
from moejax.methods.lora import LoraConfig
from moejax.models import transformer
from tests.methods.test_expert_scores import XFT, batch_of


def test_the_start_is_the_base_and_merging_changes_no_logit():
    wide = dataclasses.replace(XFT, initializer_range=0.3)
    params = transformer.init_params(wide, jax.random.key(0))
    config = LoraConfig(rank=2, alpha=6.0)
    adapters = lora.init_adapters(params, config)
    tokens = batch_of()["tokens"]
    logits = jax.jit(lambda p: transformer.logits(p, XFT, tokens))
    base = logits(params)
    np.testing.assert_array_equal(logits(lora.attach(adapters, params, config)), base)
    wave = lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)  # noqa: E731
    moved = jax.tree.map(wave, adapters)
    attached = logits(lora.attach(moved, params, config))
    assert float(jnp.abs(attached - base).max()) > 0.1
    merged = lora.merge(moved, params, config)
    np.testing.assert_allclose(logits(merged), attached, rtol=1e-4, atol=1e-4)
    a, b = (moved["layers"]["0"]["lora"]["attn"]["w_o"][x] for x in "ab")
    w = params["layers"]["0"]["attn"]["w_o"][1]
    wanted = w + (3.0 * a[1] @ b[1]).reshape(w.shape)
    found = merged["layers"]["0"]["attn"]["w_o"][1]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert merged["embed"]["tokens"] is params["embed"]["tokens"]


def test_targets_choose_weights_and_experts_have_their_own_factors():
    params = transformer.abstract_params(XFT)
    adapters = lora.abstract_adapters(params, LoraConfig(rank=3, targets=("moe/experts/w_up",)))
    shapes = {path: leaf.shape for path, leaf in tree.flatten(adapters).items()}
    at = "layers/0/lora/moe/experts/w_up"
    assert shapes == {f"{at}/a": (2, 5, 16, 3), f"{at}/b": (2, 5, 3, 24)}
    with pytest.raises(InputError, match="'attn/w_x' fits no linear map"):
        lora.abstract_adapters(params, LoraConfig(targets=("attn/w_x", "attn/w_q")))
