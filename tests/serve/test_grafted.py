"""Generation with a bridge equals teacher forcing on the same tokens."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data.grafting import Joined
from moejax.methods.graft import GraftConfig, init_bridge
from moejax.methods.graft_forward import grafted, make_reading, source_states
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.models.transformer import unembed
from moejax.serve.grafted import Grafted, GraftedText, Lender, generate_text
from moejax.serve.sampling import SamplingConfig
from tests.data.test_alignment import tokenizers

FIRST, SECOND = tokenizers()
GRAFT = GraftConfig(12, 16, "inside", every=1, taps=(0, -1), num_heads=2, bottleneck=4,
                    start="sigmoid")
PROMPT = "the capital of France is Par"


@functools.cache
def pair(how: str, prefix: bool = False, graft: GraftConfig = GRAFT) -> Grafted:
    source_tokenizer = FIRST if how == "same" else SECOND
    source = ModelConfig("llama", source_tokenizer.vocab_size, 2, 12, 20, 2, 1, 6, max_position=512)
    target = ModelConfig("llama", FIRST.vocab_size, 2, 16, 24, 2, 2, 8, max_position=128)
    bridge = init_bridge(jax.random.key(2), graft, target)
    lender = Lender(
        source,
        transformer.init_params(source, jax.random.key(0)),
        graft,
        bridge,
        Joined(FIRST, source_tokenizer, how, prefix),
    )
    params = transformer.init_params(target, jax.random.key(1))
    return Grafted(target, params, {"source": lender})


@pytest.mark.parametrize(
    ("how", "prefix"),
    [
        ("same", False),
        ("settled", False),
        pytest.param("cut", False, marks=pytest.mark.slow),
        pytest.param("settled", True, marks=pytest.mark.slow),
    ],
)
def test_cached_generation_equals_teacher_forcing(how, prefix):
    model = pair(how, prefix)
    text = GraftedText(model, PROMPT, 14)
    drawn = list(text.draw(SamplingConfig(1.5), jax.random.key(3)))
    assert len(drawn) > 8
    if not prefix:  # the source read on while the target wrote
        assert drawn[-1].num_source["source"] > drawn[0].num_source["source"]
    lender = model.lenders["source"]
    states = jax.jit(lambda p, t: source_states(p, lender.config, GRAFT.taps, t)[0])(
        lender.params, jnp.asarray([text.source_ids])
    )
    limits = jnp.asarray([text.limits])

    @jax.jit
    def forced(target_params, bridge, ids):
        reading = make_reading(bridge, GRAFT, states, limits)
        hidden = grafted(target_params, model.target, ids, {"s": reading}).hidden_BTD
        return unembed(target_params, model.target, hidden)[0]

    logits = forced(model.target_params, lender.bridge, jnp.asarray([text.ids]))
    start = len(text.ids) - len(drawn)
    for step, token in enumerate(drawn):
        np.testing.assert_allclose(token.logits_V, logits[start + step], atol=2e-5)
        assert token.limits["source"] == text.limits[start + step]


def test_split_layers_and_greedy_text_agree():
    model = pair("settled")
    whole = generate_text(model, PROMPT, 6)
    lender = model.lenders["source"]
    lender = dataclasses.replace(lender, params=transformer.split_layers(lender.params))
    split = Grafted(
        model.target, transformer.split_layers(model.target_params), {"source": lender}
    )
    assert generate_text(split, PROMPT, 6) == whole


def test_two_sources_and_each_switched_off():
    first, second = pair("same"), pair("settled")
    both = Grafted(
        first.target, first.target_params,
        {"a": first.lenders["source"], "b": second.lenders["source"]},
    )
    ids = FIRST.encode(PROMPT, add_special=True)

    def logits(model, sources):
        text = GraftedText(model, ids, 3, sources)
        return np.stack([d.logits_V for d in text.draw(SamplingConfig(0), jax.random.key(0))])

    one, other = logits(first, None), logits(second, None)
    np.testing.assert_array_equal(logits(both, ["a"]), one)
    np.testing.assert_array_equal(logits(both, ["b"]), other)
    assert np.abs(logits(both, None)[0] - one[0]).max() > 1e-3
    # Without any the target is itself, and no source is read.
    text = GraftedText(both, ids, 3, ())
    assert not text.loans
    alone = transformer.logits(both.target_params, both.target, jnp.asarray([ids]))[0, -1]
    drawn = next(text.draw(SamplingConfig(0), jax.random.key(0)))
    np.testing.assert_allclose(drawn.logits_V, alone, atol=2e-5)
    with pytest.raises(InputError, match="'c' is unknown: there is a, b"):
        GraftedText(both, PROMPT, 3, ["c"])


def test_what_cannot_be_generated():
    paper = GraftConfig.paper(12, 16)
    with pytest.raises(InputError, match="not written yet"):
        GraftedText(pair("same", False, paper), PROMPT, 3)
    with pytest.raises(InputError, match="shorten it"):
        GraftedText(pair("settled"), "x " * 300, 3)
