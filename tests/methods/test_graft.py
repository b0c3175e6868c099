"""LLM Modules: what a bridge must never do, and that it does what the reference's does."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods.graft import GraftConfig, bridge_shapes, check_fits, init_bridge
from moejax.methods.graft_forward import SEES_ALL, grafted, make_reading, source_states
from moejax.models import transformer
from moejax.models.config import EmbeddingConfig, ModelConfig
from moejax.models.transformer import unembed
from moejax.ops.cross_attention import (
    NUM_BUCKETS,
    attention_weights,
    bucket,
    cross_attention,
    first_distances,
)

SOURCE = ModelConfig("llama", 19, 3, 12, 20, 2, 1, 6, max_position=64)
TARGET = ModelConfig("llama", 19, 5, 16, 24, 2, 2, 8, max_position=64)
LEARNED = ModelConfig(
    "gpt_neo", 19, 5, 16, 24, 2, 2, 8, max_position=64, embedding=EmbeddingConfig("learned")
)
PAPER = GraftConfig.paper(12, 16)
KINDS = {
    "inside": GraftConfig(12, 16, "inside", every=2, taps=(0, -1), num_heads=2, bottleneck=4),
    "inside_token": GraftConfig(12, 16, "inside", every=3, num_heads=2, gate="token"),
    "before": GraftConfig(12, 16, "before", num_heads=2, bottleneck=4, start="zero_output"),
    "before_scalar": GraftConfig(12, 16, "before", num_heads=4, gate="scalar"),
    "sigmoid": GraftConfig(12, 16, "inside", every=2, num_heads=2, start="sigmoid"),
}


def moved(params, seed=7, by=0.3):
    """The same tree with every leaf moved: gates are open then."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        treedef,
        [x + by * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)],
    )


def models(graft, target=TARGET, split=False):
    source_params = transformer.init_params(SOURCE, jax.random.key(0))
    target_params = moved(transformer.init_params(target, jax.random.key(1)), 3, 0.1)
    bridge = init_bridge(jax.random.key(2), graft, target)
    if split:
        target_params = transformer.split_layers(target_params)
    return source_params, target_params, bridge


@functools.partial(jax.jit, static_argnums=(0, 5))
def logits(graft, parts, source_BS, tokens_BT, limit_BT, target=TARGET, open_B=None):
    source_params, target_params, bridge = parts
    states, _ = source_states(source_params, SOURCE, graft.taps, source_BS)
    reading = make_reading(bridge, graft, states, limit_BT, open_B)
    hidden = grafted(target_params, target, tokens_BT, {"s": reading}).hidden_BTD
    return unembed(target_params, target, hidden)


@jax.jit
def alone(target_params):
    return transformer.logits(target_params, TARGET, TOKENS)


@functools.partial(jax.jit, static_argnums=0)
def bridge_gradient(graft, parts):
    def total(bridge):
        return jnp.sum(logits(graft, (*parts[:2], bridge), TOKENS, TOKENS, CAUSAL)[..., :3])

    return jax.grad(total)(parts[2])


@functools.partial(jax.jit, static_argnums=0)
def states_of(taps, params):
    return source_states(params, SOURCE, taps, TOKENS)[0]


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 19, (2, 9)))
CAUSAL = jnp.broadcast_to(jnp.arange(1, 10), (2, 9))


@pytest.mark.parametrize("name", ["inside", "inside_token", "before", "before_scalar"])
def test_at_step_0_the_target_is_as_it_was(name):
    graft = KINDS[name]
    parts = models(graft)
    found = logits(graft, parts, TOKENS, TOKENS, CAUSAL)
    np.testing.assert_array_equal(found, alone(parts[1]))
    if name not in ("inside", "before"):
        return
    # And yet the bridge learns at once.
    grads = bridge_gradient(graft, parts)
    assert any(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", list(KINDS))
def test_no_earlier_logit_depends_on_a_later_token(name):
    graft = KINDS[name]
    source_params, target_params, bridge = models(graft)
    parts = source_params, target_params, moved(bridge)
    before = logits(graft, parts, TOKENS, TOKENS, CAUSAL)
    changed = TOKENS.at[:, 5].set((TOKENS[:, 5] + 1) % 19)
    after = logits(graft, parts, changed, changed, CAUSAL)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert float(jnp.abs(before[:, 5:] - after[:, 5:]).max()) > 1e-3
    states = states_of(graft.taps, source_params)

    @jax.jit
    def early(states):  # of the logits up to token 4
        reading = make_reading(parts[2], graft, states, CAUSAL)
        hidden = grafted(target_params, TARGET, TOKENS, {"s": reading}).hidden_BTD
        return jnp.sum(hidden[:, :5] ** 2)

    grads = jax.grad(early)(states)
    assert float(jnp.abs(grads[:, 5:]).max()) == 0 < float(jnp.abs(grads[:, :5]).max())


def test_the_papers_mode_sees_later_tokens():
    graft = PAPER
    source_params, target_params, bridge = models(graft, LEARNED)
    parts = source_params, target_params, bridge
    everything = jnp.full((2, 9), SEES_ALL)
    before = logits(graft, parts, TOKENS, TOKENS, everything, LEARNED)
    changed = TOKENS.at[:, 8].set((TOKENS[:, 8] + 1) % 19)
    after = logits(graft, parts, changed, changed, everything, LEARNED)
    assert float(jnp.abs(before[:, :8] - after[:, :8]).max()) > 1e-5


def test_the_papers_parameters_are_counted_as_in_the_reference():
    neo = ModelConfig(
        "gpt_neo", 100, 12, 768, 3072, 12, 12, 64, embedding=EmbeddingConfig("learned")
    )
    shapes = bridge_shapes(GraftConfig.paper(1536, 768), neo)
    sizes = {path: int(np.prod(shape)) for path, shape in shapes.items()}
    layers = sum(n for path, n in sizes.items() if path.startswith("layers/"))
    assert layers / 2 == pytest.approx(5.123e6, rel=1e-3)
    assert sum(sizes.values()) == pytest.approx(16.45e6, rel=1e-3)


def test_the_papers_layer_is_the_references_formula():
    """Against numpy, written from the formulas alone."""
    source_params, target_params, bridge = models(PAPER, LEARNED)
    states = states_of((-1,), source_params)
    got = logits(PAPER, (source_params, target_params, bridge), TOKENS, TOKENS,
                 jnp.full((2, 9), SEES_ALL), LEARNED)
    b = jax.tree.map(lambda x: np.asarray(x, np.float64), bridge)
    q = np.asarray(states, np.float64)
    erf = np.vectorize(__import__("math").erf)

    def ln(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def gelu(x):
        return x * 0.5 * (1 + erf(x / np.sqrt(2)))

    r = q @ b["pre"]["w"] + b["pre"]["b"]
    f = b["first"]
    z = ln(r @ f["w_in"] + f["b_in"], f["norm"])
    z = ln(gelu(z) @ f["w_out"] + f["b_out"], f["out_norm"])
    for i in range(2):
        p = jax.tree.map(lambda x, i=i: x[i], b["layers"])
        query = np.einsum("btd,dhc->bhtc", ln(z, p["x_norm"]), p["w_q"]) + p["b_q"][:, None]
        key = np.einsum("bsr,rhc->bhsc", ln(r, p["r_norm"]), p["w_k"]) + p["b_k"][:, None]
        value = np.einsum("bsr,rhc->bhsc", ln(r, p["r_norm"]), p["w_v"]) + p["b_v"][:, None]
        scores = np.einsum("bhtc,bhsc->bhts", query, key) / np.sqrt(query.shape[-1])
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        c = np.einsum("bhts,bhsc,hcd->btd", weights, value, p["w_o"]) + p["b_o"]
        a = c + ln(gelu(c @ p["w_in"] + p["b_in"]) @ p["w_out"] + p["b_out"], p["a_norm"])
        g = 1 / (1 + np.exp(-(np.concatenate([z, a], -1) @ p["w_gate"] + p["b_gate"])))
        z = z + g * a + (1 - g) * z
    x = z + r @ b["skip"]["w"] + b["skip"]["b"]
    inserted = transformer.Inserted(before=lambda _: jnp.asarray(x, jnp.float32))
    hidden = transformer.forward(target_params, LEARNED, TOKENS, inserted=inserted).hidden_BTD
    np.testing.assert_allclose(got, unembed(target_params, LEARNED, hidden), atol=2e-5)


def test_split_layers_and_scanned_ones_agree():
    graft = KINDS["inside"]
    source_params, target_params, bridge = models(graft)
    parts = source_params, target_params, moved(bridge)
    scanned = logits(graft, parts, TOKENS, TOKENS, CAUSAL)
    split = (source_params, transformer.split_layers(target_params), parts[2])
    np.testing.assert_allclose(scanned, logits(graft, split, TOKENS, TOKENS, CAUSAL), atol=2e-5)


def test_rows_without_a_source_and_tokens_without_states():
    graft = KINDS["sigmoid"]
    source_params, target_params, bridge = models(graft)
    parts = source_params, target_params, moved(bridge)
    as_it_was = alone(target_params)
    found = logits(graft, parts, TOKENS, TOKENS, CAUSAL, TARGET, jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(found[0], as_it_was[0])
    assert float(jnp.abs(found[1] - as_it_was[1]).max()) > 1e-3
    unseen = logits(graft, parts, TOKENS, TOKENS, jnp.maximum(CAUSAL - 4, 0))
    np.testing.assert_array_equal(unseen[:, :4], as_it_was[:, :4])


def test_a_tap_is_the_state_after_its_block():
    params = transformer.init_params(SOURCE, jax.random.key(0))
    states = states_of((1, -1), params)
    cut = tree.unflatten({
        path: leaf[:2] if path.startswith("layers/") else leaf
        for path, leaf in tree.flatten(params).items()
    })

    def after(block, x, kept):
        return x, x

    two = ModelConfig("llama", 19, 2, 12, 20, 2, 1, 6, max_position=64)
    shape = jnp.zeros((2, 9, 12))
    seen = transformer.forward(
        cut, two, TOKENS, inserted=transformer.Inserted(after=after, kept=shape)
    ).kept
    np.testing.assert_allclose(states[..., :12], seen, atol=1e-6)
    whole = transformer.forward(params, SOURCE, TOKENS).hidden_BTD
    np.testing.assert_allclose(states[..., 12:], whole, atol=1e-6)
    grads = jax.jit(jax.grad(lambda p: states_of((1, -1), p).sum()))(params)
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(grads))


def test_cross_attention_in_chunks_and_its_gradient():
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 11, 3, 4))
    k, v = (jax.random.normal(key, (2, 3, 7, 4)) for key in keys[1:3])
    bias = jax.random.normal(keys[3], (3, 24))
    limit = jnp.asarray(np.random.default_rng(0).integers(0, 9, (2, 11)))

    def value(max_bytes):
        def f(q, k, v, bias):
            return jnp.sum(jnp.sin(cross_attention(q, k, v, limit, bias, max_bytes)))

        return jax.value_and_grad(f, argnums=(0, 1, 2, 3))(q, k, v, bias)

    whole, parts = value(1 << 20), value(4 * 2 * 3 * 7 * 2)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    weights = attention_weights(q, k, limit, bias)
    sums = jnp.where(limit > 0, 1.0, 0.0)[:, None]
    np.testing.assert_allclose(weights.sum(-1), jnp.broadcast_to(sums, (2, 3, 11)), atol=1e-6)
    distances = bucket(jnp.array([0, 1, 7, 8, 9, 100, 4095, 100_000]))
    assert distances.tolist() == sorted(distances.tolist()) and distances[-1] == 23


def test_a_fresh_bridge_reads_the_newest_states_first():
    firsts = np.ceil(first_distances()).astype(int)
    assert bucket(jnp.asarray(firsts)).tolist() == list(range(NUM_BUCKETS))
    layer = init_bridge(jax.random.key(0), KINDS["before_scalar"], TARGET)["layers"]
    q, k = jnp.zeros((1, 1, 4, 4)), jnp.zeros((1, 4, 200, 4))
    for bias in layer["distance"]:
        weights = attention_weights(q, k, jnp.array([[160]]), bias)[0, :, 0]
        newest = np.asarray(weights[:, 159])
        np.testing.assert_allclose(newest[0], 1 - np.exp(-4), rtol=1e-3)
        assert (np.diff(newest) < 0).all() and (np.diff(weights[:, :160]) >= 0).all()
        assert not weights[:, 160:].any()


def test_what_cannot_be_joined_is_refused():
    with pytest.raises(InputError, match="source has no layer 3"):
        check_fits(GraftConfig(12, 16, taps=(3,)), SOURCE, TARGET)
    with pytest.raises(InputError, match="source of size 13"):
        check_fits(GraftConfig(13, 16), SOURCE, TARGET)
    with pytest.raises(InputError, match="more than the target's 5 layers"):
        check_fits(GraftConfig(12, 16, every=6), SOURCE, TARGET)
    refused = [{"placement": "behind"}, {"gate": "both"}, {"num_heads": 3}, {"taps": ()}]
    for wrong in (*refused, {"placement": "paper"}, {"bottleneck": 0}):
        with pytest.raises(InputError):
            GraftConfig(12, 16, **wrong)
    with pytest.raises(InputError, match="one tokenizer"):
        parts = models(PAPER, LEARNED)
        logits(PAPER, parts, TOKENS[:, :5], TOKENS, jnp.full((2, 9), SEES_ALL), LEARNED)
