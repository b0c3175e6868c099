"""A smaller vocabulary: texts, hidden states and logits of what is left are the old ones."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io.loaded import Loaded
from moejax.methods import bottleneck
from moejax.methods.vocabulary import prune_vocabulary
from moejax.models import transformer
from moejax.models.config import ModelConfig
from tests.data.test_alignment import tokenizers

SHORT = "the capital of France is Paris"


def test_the_same_tokens_states_and_logits():
    tokenizer = tokenizers()[0]
    config = ModelConfig("llama", tokenizer.vocab_size, 1, 8, 12, 2, 1, 4, max_position=64)
    params = jax.tree.map(np.asarray, transformer.init_params(config, jax.random.key(0)))
    whole = Loaded(params, config, tokenizer)
    cut, kept = prune_vocabulary(whole, [SHORT])
    assert cut.config.vocab_size == len(kept) < tokenizer.vocab_size
    assert cut.tokenizer is not None and cut.tokenizer.vocab_size == len(kept)
    ids = np.array(tokenizer.encode(SHORT))
    new = np.array(cut.tokenizer.encode(SHORT))
    np.testing.assert_array_equal(kept[new], ids)
    assert cut.tokenizer.decode(new.tolist()) == SHORT
    # A text of bytes that no kept token has still has its tokens.
    assert cut.tokenizer.decode(cut.tokenizer.encode("zyx \u00df")) == "zyx \u00df"
    old = transformer.logits(whole.params, config, ids[None])
    found = transformer.logits(cut.params, cut.config, new[None])
    np.testing.assert_array_equal(found, np.asarray(old)[..., kept])


def test_only_a_tokenizer_with_merges_can_be_cut():
    config = ModelConfig("llama", 300, 1, 8, 12, 2, 1, 4, max_position=64)
    with pytest.raises(InputError, match="no tokenizer"):
        prune_vocabulary(Loaded({}, config, None), [SHORT])


def test_adapters_start_as_nothing_and_have_the_size_asked_for():
    config = ModelConfig("llama", 30, 4, 16, 24, 2, 1, 8, max_position=64)
    width = bottleneck.equal_width(config, 2, 2000)
    adapters = bottleneck.init_adapters(jax.random.key(0), config, 2, width)
    assert abs(tree.num_params(adapters) - 2000) <= 2 * (2 * 16 + 1)
    params = transformer.init_params(config, jax.random.key(1))
    tokens = np.arange(6)[None]
    plain = transformer.logits(params, config, tokens)
    more = {"inserted": bottleneck.inserted(adapters, 2)}
    np.testing.assert_array_equal(transformer.logits(params, config, tokens, **more), plain)
    moved = jax.tree.map(lambda x: x + 0.1, adapters)
    more = {"inserted": bottleneck.inserted(moved, 2)}
    changed = transformer.logits(params, config, tokens, **more)
    assert np.abs(np.asarray(changed - plain)).max() > 0.01
