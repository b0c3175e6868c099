"""The harness of masks: a cache read densely, then masked tokens; thresholds as they say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.evals import masked
from moejax.methods import shadow_mask, shadow_rivals
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig
from moejax.serve.likelihood import log_likelihoods

CONFIG = ModelConfig("llama", 61, 3, 32, 48, 4, 2, 8, initializer_range=0.2)
SIZES = shadow_mask.sizes_of(CONFIG, 8)
PARAMS = transformer.init_params(CONFIG, jax.random.key(0))
PAIRS = [([1, 2, 3, 4, 5], [6, 7, 8]), ([9, 8], [7, 6, 5, 4, 3, 2]), ([3, 1, 4], [1, 5, 9, 2])]
BATCH = masked.batches(PAIRS, 300)[0]


def random_mask(count):
    draw = np.random.default_rng(0)
    scores = shadow_mask.Mask(
        draw.random((count, 3, SIZES.heads)), draw.random((count, 3, SIZES.blocks))
    )
    return shadow_mask.select(scores, SIZES, 0.5)


READ = functools.lru_cache(lambda: masked.read_prompts(PARAMS, CONFIG, BATCH))


def in_order(nats_B):
    return nats_B[np.argsort(BATCH.rows)]


def test_without_a_mask_it_is_the_likelihood():
    full = shadow_mask.full_mask(SIZES)
    full = jax.tree.map(lambda m: jnp.broadcast_to(m, (4, *m.shape)), full)
    got = in_order(masked.masked_nats(PARAMS, CONFIG, BATCH, READ(), full, SIZES)[:3])
    want = [-found.log_prob for found in log_likelihoods(PARAMS, CONFIG, PAIRS)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_it_is_one_pass_with_the_prompt_dense():
    mask = random_mask(4)
    got = masked.masked_nats(PARAMS, CONFIG, BATCH, READ(), mask, SIZES)
    tokens = np.zeros((4, 12), np.int32)
    prompts = np.ones(4, np.int32)
    for row, at in enumerate(BATCH.rows):
        ids = [*PAIRS[at][0], *PAIRS[at][1]]
        tokens[row, : len(ids)], prompts[row] = ids, len(PAIRS[at][0])
    inserted = shadow_mask.inserted_of(mask, CONFIG, SIZES, prompts)
    run = jax.jit(lambda p: transformer.logits(p, CONFIG, tokens, inserted=inserted))
    logs = jax.nn.log_softmax(run(PARAMS))
    for row, at in enumerate(BATCH.rows):
        first, count = len(PAIRS[at][0]), len(PAIRS[at][1])
        scored = np.arange(first, first + count)
        want = -logs[row, scored - 1, tokens[row, scored]].sum()
        np.testing.assert_allclose(got[row], want, rtol=1e-5)


def test_a_mask_for_every_token_is_the_rows_own_where_all_are_alike():
    mask = random_mask(4)
    count = BATCH.rest_BR.shape[1] - 1
    each = jax.tree.map(lambda m: jnp.repeat(m[:, None], count, 1), mask)
    one, many = (masked.masked_nats(PARAMS, CONFIG, BATCH, READ(), m, SIZES) for m in (mask, each))
    np.testing.assert_allclose(many, one, rtol=1e-5)
    # Of another mask for the second token on, the first that follows is still the prompt's.
    other = jax.tree.map(lambda m: m.at[:, 1:].set(~m[:, 1:]), each)
    changed = masked.masked_nats(PARAMS, CONFIG, BATCH, READ(), other, SIZES)
    longer = BATCH.length_B > 2
    assert (np.abs(changed - one)[longer[: len(one)]] > 1e-4).all()


def test_contexts_are_those_of_the_first_layer():
    found = masked.contexts(PARAMS, CONFIG, BATCH, READ())
    row = BATCH.rows.index(1)
    tokens = jnp.array([[*PAIRS[1][0], *PAIRS[1][1]]])
    inserted = transformer.Inserted(heads=lambda part, x: (x, x))
    run = jax.jit(lambda p: transformer.forward(p, CONFIG, tokens, inserted=inserted).seen)
    seen = run(PARAMS)["0"]["heads"][0, 0, len(PAIRS[1][0]) :].reshape(len(PAIRS[1][1]), -1)
    count = len(PAIRS[1][1]) - 1
    np.testing.assert_allclose(found[row, :count], seen[:count], rtol=1e-4, atol=1e-6)


def test_signals_are_those_of_the_prompt():
    signal = READ().signals
    assert signal["context"].shape == (4, 32) and signal["griffin"].shape == (3, 4, 48)
    row = BATCH.rows.index(0)
    alone = masked.batches(PAIRS[:1], 200)[0]  # without the others, and without padding
    prompt = np.array([PAIRS[0][0]])
    alone = dataclasses.replace(alone, prompt_BP=prompt, start_B=np.zeros(1, int))
    want = masked.read_prompts(PARAMS, CONFIG, alone).signals
    np.testing.assert_allclose(signal["context"][row], want["context"][0], rtol=1e-4, atol=1e-6)
    for name in ("attn_in", "mlp_in", "griffin"):
        np.testing.assert_allclose(signal[name][:, row], want[name][:, 0], rtol=1e-4, atol=1e-5)


def test_choices_of_a_question_stay_together():
    pairs = [([1] * n, [2] * (1 + n % 3)) for n in (40, 3, 5, 60, 4, 7)]
    found = masked.batches(pairs, 300, [[0, 1], [2, 3], [4], [5]])
    assert sorted(row for b in found for row in b.rows) == list(range(6))
    assert all({0, 1} <= set(b.rows) or not {0, 1} & set(b.rows) for b in found)
    for batch in found:
        for row, at in enumerate(batch.rows):
            assert batch.prompt_BP[row, batch.start_B[row] :].tolist() == pairs[at][0]
            assert batch.rest_BR[row, : batch.length_B[row]].tolist() == pairs[at][1]


def test_griffin():
    a = np.random.default_rng(0).standard_normal((1, 6, 5)).astype(np.float32)
    unit = a[0, 2:] / np.linalg.norm(a[0, 2:], axis=1, keepdims=True)
    got = shadow_rivals.griffin(jnp.asarray(a), jnp.arange(6)[None] >= 2)
    np.testing.assert_allclose(got[0], np.linalg.norm(unit, axis=0), rtol=1e-5)


@pytest.mark.parametrize("rule", ["teal", "cats"])
def test_thresholds_drop_their_share(rule):
    tokens = jnp.array([[1, 2, 3, 4], [9, 8, 7, 6], [3, 1, 4, 1]])
    values = jax.device_get(shadow_rivals.sizes_at(PARAMS, CONFIG, tokens, rule))
    limits = shadow_rivals.thresholds(values, 0.4)
    assert all(v.shape == (3,) for v in limits.values())
    for place, v in values.items():
        share = (v.reshape(3, -1) < limits[place][:, None]).mean(1)
        np.testing.assert_allclose(share, 0.4, atol=0.02)
    nothing = shadow_rivals.thresholds(values, 0.0)
    nothing = {name: 0 * v for name, v in nothing.items()}
    dense = masked.thresholded_nats(PARAMS, CONFIG, BATCH, READ(), nothing)
    cut = masked.thresholded_nats(PARAMS, CONFIG, BATCH, READ(), limits)
    want = [-found.log_prob for found in log_likelihoods(PARAMS, CONFIG, PAIRS)]
    np.testing.assert_allclose(in_order(dense[:3]), want, rtol=1e-5)
    assert np.abs(cut - dense).max() > 1e-3
    with pytest.raises(InputError, match="outside"):
        shadow_rivals.thresholds(values, 1.0)


@pytest.mark.parametrize("rule", [pytest.param("teal", marks=pytest.mark.slow), "cats"])
def test_thresholds_inside_experts_are_those_of_the_chosen_ones(rule):
    """And the network beside them, whose activations are others, is neither measured nor cut."""
    config = dataclasses.replace(CONFIG, moe=MoEConfig(4, 2, shared_ffn=24))
    params = transformer.init_params(config, jax.random.key(0))
    tokens = jnp.array([[1, 2, 3, 4], [9, 8, 7, 6], [3, 1, 4, 1]])
    values = jax.device_get(shadow_rivals.sizes_at(params, config, tokens, rule))
    last = values["gate" if rule == "cats" else "neurons"]
    assert last.shape == (3, 3, 4, 4, 48) and np.isnan(last).mean() == 0.5
    limits = shadow_rivals.thresholds(values, 0.4)
    for place, v in values.items():
        flat = v.reshape(3, -1)
        share = (flat < limits[place][:, None]).sum(1) / np.isfinite(flat).sum(1)
        np.testing.assert_allclose(share, 0.4, atol=0.02)
    none = {place: jnp.zeros(3) for place in values}
    cut = jax.tree.map(jnp.asarray, limits)

    @jax.jit
    def logits(limits):
        inserted = limits and shadow_rivals.thresholding(config, limits)
        return transformer.logits(params, config, tokens, inserted=inserted)

    want = logits(None)
    np.testing.assert_allclose(logits(none), want, rtol=1e-4, atol=1e-5)
    assert np.abs(logits(cut) - want).max() > 1e-3


def test_cats_is_its_formula():
    """One layer by hand: neurons whose silu(gate) is small do not count."""
    config = dataclasses.replace(CONFIG, num_layers=1)
    params = transformer.init_params(config, jax.random.key(1))
    tokens, limit = jnp.array([[1, 2, 3, 4, 5]]), 0.1
    inserted = shadow_rivals.thresholding(config, {"gate": jnp.array([limit])})
    run = jax.jit(lambda p, i=inserted: transformer.forward(p, config, tokens, inserted=i))
    got = run(params).hidden_BTD
    layer = jax.tree.map(lambda w: w[0], params["layers"]["0"])

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + config.norm_eps) * scale

    off = jax.tree.map(lambda w: w, params)
    off["layers"]["0"]["mlp"] = jax.tree.map(jnp.zeros_like, params["layers"]["0"]["mlp"])
    seen = transformer.Inserted(after=lambda i, x, kept: (x, x), kept=jnp.zeros((1, 5, 32)))
    x = jax.jit(lambda p: transformer.forward(p, config, tokens, inserted=seen).kept)(off)
    n = norm(x, layer["mlp_norm"]["scale"])
    gate = jax.nn.silu(n @ layer["mlp"]["w_gate"])
    keep = jnp.abs(gate) >= limit
    assert 0.1 < keep.mean() < 0.9
    y = x + (gate * keep * (n @ layer["mlp"]["w_up"])) @ layer["mlp"]["w_down"]
    np.testing.assert_allclose(got, norm(y, params["final_norm"]["scale"]), rtol=1e-4, atol=1e-5)


def test_empty_parts_are_refused():
    with pytest.raises(InputError, match="row 1: a prompt of 0 tokens"):
        masked.batches([([1], [2]), ([], [3])], 100)
