"""Generation with a bridge equals teacher forcing on the same tokens."""

from __future__ import annotations

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
from moejax.serve.grafted import Grafted, GraftedText, generate_text
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
    return Grafted(
        source,
        transformer.init_params(source, jax.random.key(0)),
        target,
        transformer.init_params(target, jax.random.key(1)),
        graft,
        bridge,
        Joined(FIRST, source_tokenizer, how, prefix),
    )


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
        assert drawn[-1].num_source > drawn[0].num_source
    states = jax.jit(lambda p, t: source_states(p, model.source, GRAFT.taps, t)[0])(
        model.source_params, jnp.asarray([text.source_ids])
    )
    limits = jnp.asarray([text.limits])

    @jax.jit
    def forced(target_params, bridge, ids):
        reading = make_reading(bridge, GRAFT, states, limits)
        hidden = grafted(target_params, model.target, ids, {"s": reading}).hidden_BTD
        return unembed(target_params, model.target, hidden)[0]

    logits = forced(model.target_params, model.bridge, jnp.asarray([text.ids]))
    start = len(text.ids) - len(drawn)
    for step, token in enumerate(drawn):
        np.testing.assert_allclose(token.logits_V, logits[start + step], atol=2e-5)
        assert token.limit == text.limits[start + step]


def test_split_layers_and_greedy_text_agree():
    model = pair("settled")
    whole = generate_text(model, PROMPT, 6)
    split = Grafted(
        model.source,
        transformer.split_layers(model.source_params),
        model.target,
        transformer.split_layers(model.target_params),
        GRAFT,
        model.bridge,
        model.joined,
    )
    assert generate_text(split, PROMPT, 6) == whole


def test_what_cannot_be_generated():
    paper = GraftConfig.paper(12, 16)
    with pytest.raises(InputError, match="not written yet"):
        GraftedText(pair("same", False, paper), PROMPT, 3)
    with pytest.raises(InputError, match="shorten it"):
        GraftedText(pair("settled"), "x " * 300, 3)
