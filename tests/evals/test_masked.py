"""The harness of masks: it is what decoding computes, and thresholds are what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.evals import masked
from moejax.methods import shadow_mask, shadow_rivals
from moejax.models import transformer
from moejax.models.cache import init_cache
from moejax.models.config import ModelConfig
from moejax.serve.likelihood import log_likelihoods

CONFIG = ModelConfig("llama", 61, 3, 32, 48, 4, 2, 8, initializer_range=0.2)
SIZES = shadow_mask.sizes_of(CONFIG, 8)
PARAMS = transformer.init_params(CONFIG, jax.random.key(0))
PAIRS = [([1, 2, 3, 4, 5], [6, 7, 8]), ([9, 8], [7, 6, 5, 4, 3, 2]), ([3, 1, 4], [1, 5, 9, 2])]
BATCH = masked.batches(PAIRS, 200)[0]


def random_mask(count):
    draw = np.random.default_rng(0)
    scores = shadow_mask.Mask(
        draw.random((count, 3, SIZES.heads)), draw.random((count, 3, SIZES.blocks))
    )
    return shadow_mask.select(scores, SIZES, 0.5)


def test_without_a_mask_it_is_the_likelihood():
    full = shadow_mask.full_mask(SIZES)
    full = jax.tree.map(lambda m: jnp.broadcast_to(m, (4, *m.shape)), full)
    nll = masked.masked_nll(PARAMS, CONFIG, BATCH, full, SIZES)
    got = masked.nats([(BATCH, nll)], 3)
    want = [-found.log_prob for found in log_likelihoods(PARAMS, CONFIG, PAIRS)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_it_is_what_decoding_computes():
    """The prompt into a cache densely, then the rest on that cache under the mask."""
    mask = random_mask(4)
    nll_BT = masked.masked_nll(PARAMS, CONFIG, BATCH, mask, SIZES)
    for row, at in enumerate(BATCH.rows):
        prompt, rest = (jnp.array([ids]) for ids in PAIRS[at])
        cache = init_cache(CONFIG, jnp.zeros(1, jnp.int32), 16)
        read = transformer.forward(PARAMS, CONFIG, prompt, cache=cache)
        mine = jax.tree.map(lambda m, row=row: m[row], mask)
        inserted = shadow_mask.inserted_of(mine, CONFIG, SIZES)
        out = transformer.forward(PARAMS, CONFIG, rest, cache=read.cache, inserted=inserted)
        hidden = jnp.concatenate([read.hidden_BTD[:, -1:], out.hidden_BTD[:, :-1]], axis=1)
        logs = jax.nn.log_softmax(transformer.unembed(PARAMS, CONFIG, hidden[0]))
        want = -logs[jnp.arange(rest.shape[1]), rest[0]]
        first = prompt.shape[1]
        got = nll_BT[row, first : first + rest.shape[1]]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        assert (nll_BT[row, :first] == 0).all()


def test_signals_are_those_of_the_prompt():
    signal = masked.signals(PARAMS, CONFIG, BATCH.tokens_BT, BATCH.prompt_B)
    changed = BATCH.tokens_BT.copy()
    for row, prompt in enumerate(BATCH.prompt_B):
        changed[row, prompt:] = 50  # another answer
    again = masked.signals(PARAMS, CONFIG, changed, BATCH.prompt_B)
    assert signal["context"].shape == (4, 32) and signal["griffin"].shape == (3, 4, 48)
    for name, value in signal.items():
        np.testing.assert_allclose(value, again[name], rtol=1e-6, atol=1e-7)


def test_griffin():
    a = np.random.default_rng(0).standard_normal((1, 6, 5)).astype(np.float32)
    unit = a[0, :4] / np.linalg.norm(a[0, :4], axis=1, keepdims=True)
    got = shadow_rivals.griffin(jnp.asarray(a), jnp.array([4]))
    np.testing.assert_allclose(got[0], np.linalg.norm(unit, axis=0), rtol=1e-5)


@pytest.mark.parametrize("rule", ["teal", "cats"])
def test_thresholds_drop_their_share(rule):
    tokens = jnp.asarray(BATCH.tokens_BT[:3, :6])
    values = jax.device_get(shadow_rivals.sizes_at(PARAMS, CONFIG, tokens, rule))
    limits = shadow_rivals.thresholds(values, 0.4)
    assert all(v.shape == (3,) for v in limits.values())
    for place, v in values.items():
        share = (v.reshape(3, -1) < limits[place][:, None]).mean(1)
        np.testing.assert_allclose(share, 0.4, atol=0.02)
    nothing = shadow_rivals.thresholds(values, 0.0)
    dense = masked.thresholded_nll(PARAMS, CONFIG, BATCH, {n: 0 * v for n, v in nothing.items()})
    cut = masked.thresholded_nll(PARAMS, CONFIG, BATCH, limits)
    want = [-found.log_prob for found in log_likelihoods(PARAMS, CONFIG, PAIRS)]
    np.testing.assert_allclose(masked.nats([(BATCH, dense)], 3), want, rtol=1e-5)
    assert np.abs(cut - dense).max() > 1e-3
    with pytest.raises(InputError, match="outside"):
        shadow_rivals.thresholds(values, 1.0)


def test_cats_is_its_formula():
    """One layer by hand: neurons whose silu(gate) is small do not count."""
    config = dataclasses.replace(CONFIG, num_layers=1)
    params = transformer.init_params(config, jax.random.key(1))
    tokens, limit = BATCH.tokens_BT[:1, :5], 0.1
    inserted = shadow_rivals.thresholding(config, {"gate": jnp.array([limit])}, jnp.array([0]))
    got = transformer.forward(params, config, tokens, inserted=inserted).hidden_BTD
    layer = jax.tree.map(lambda w: w[0], params["layers"]["0"])

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + config.norm_eps) * scale

    off = jax.tree.map(lambda w: w, params)
    off["layers"]["0"]["mlp"] = jax.tree.map(jnp.zeros_like, params["layers"]["0"]["mlp"])
    keep = {}
    seen = transformer.Inserted(after=lambda i, x, kept: (x, x), kept=jnp.zeros((1, 5, 32)))
    x = transformer.forward(off, config, tokens, inserted=seen).kept
    n = norm(x, layer["mlp_norm"]["scale"])
    gate = jax.nn.silu(n @ layer["mlp"]["w_gate"])
    keep = jnp.abs(gate) >= limit
    assert 0.1 < keep.mean() < 0.9
    y = x + (gate * keep * (n @ layer["mlp"]["w_up"])) @ layer["mlp"]["w_down"]
    np.testing.assert_allclose(got, norm(y, params["final_norm"]["scale"]), rtol=1e-4, atol=1e-5)


def test_empty_parts_are_refused():
    with pytest.raises(InputError, match="row 1: a prompt of 0 tokens"):
        masked.batches([([1], [2]), ([], [3])], 100)
