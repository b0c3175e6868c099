"""Log-likelihoods equal those of the full logits, whatever shares the batch."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.serve.generate import prepare
from moejax.serve.likelihood import log_likelihoods
from tests.serve.test_generate import CONFIGS, DYNAMIC, TINY, full_logits, random_params

RNG = np.random.default_rng(3)
PAIRS = [
    (RNG.integers(0, 101, n).tolist(), RNG.integers(0, 101, m).tolist())
    for n, m in ((3, 2), (1, 1), (40, 30), (7, 1), (7, 0), (20, 9))
]
# Choices of one token after one context are one text.
PAIRS += [(PAIRS[3][0], [5]), (PAIRS[3][0], [6])]


def by_full_logits(config, params, context, continuation):
    """The definition: ln softmax of the whole text's logits, one pair at a time."""
    text = [*context, *continuation]
    text_BT = np.zeros((1, 96), np.int32)
    text_BT[0, : len(text)] = text
    # The last token is not read, which "dynamic" rope would see.
    logits = full_logits(config, params, text_BT, np.array([max(1, len(text) - 1)]))
    log_probs_TV = np.asarray(jax.nn.log_softmax(logits[0], axis=-1))
    rows = np.arange(len(context) - 1, len(text) - 1)
    return log_probs_TV[rows, continuation], log_probs_TV[rows]


@pytest.mark.parametrize("name", ["plain", "moe", "dynamic"])
def test_equal_to_full_logits(name):
    config = CONFIGS.get(name, DYNAMIC)
    params = random_params(config)
    tree = prepare(params) if name == "plain" else params
    found = log_likelihoods(tree, config, PAIRS, max_batch_tokens=128, num_top=3)
    for (context, continuation), got in zip(PAIRS, found, strict=True):
        taken, log_probs_TV = by_full_logits(config, params, context, continuation)
        np.testing.assert_allclose(got.token_log_probs, taken, atol=2e-5)
        assert got.log_prob == pytest.approx(taken.sum(), abs=1e-4)
        likeliest = log_probs_TV.argmax(-1).tolist()
        assert got.greedy == (likeliest == list(continuation))
        assert [ids[0] for ids in got.top_ids] == likeliest
        np.testing.assert_allclose(
            np.reshape(got.top_log_probs, (-1, 3)), -np.sort(-log_probs_TV)[:, :3], atol=2e-5
        )


def test_greedy_continuations_are_told():
    params = random_params(TINY)
    context = [4, 8, 15]
    for _ in range(3):
        found = log_likelihoods(params, TINY, [(context, [0])], num_top=1)
        context = [*context, found[0].top_ids[0][0]]
    other = [*context[3:5], (context[5] + 1) % 101]
    found = log_likelihoods(params, TINY, [(context[:3], context[3:]), (context[:3], other)])
    assert [f.greedy for f in found] == [True, False]
    assert found[0].top_ids == ()


def test_texts_are_read_once_and_progress_is_told():
    told = []
    found = log_likelihoods(
        random_params(TINY), TINY, PAIRS, max_batch_tokens=64,
        progress=lambda *numbers: told.append(numbers),
    )  # fmt: skip
    assert len(found) == len(PAIRS) and told[-1] == (len(PAIRS), len(PAIRS))
    assert found[4].log_prob == 0.0 and found[4].greedy and found[4].token_log_probs == ()


@pytest.mark.parametrize(
    "pair, message",
    [
        (([], [1]), "pair 1 has an empty context"),
        (([1] * 200, [1] * 58), "pair 1 has 257 tokens to read and the model reads 256"),
        (([1], [101]), "pair 1 has token id 101 and the model knows 0 to 100"),
        (([-1], []), "pair 1 has token id -1"),
    ],
)
def test_bad_pairs_are_named(pair, message):
    with pytest.raises(InputError, match=message) as error:
        log_likelihoods({}, TINY, [([1], [2]), pair])
    assert "\n" not in str(error.value)


def test_the_longest_text_fits_and_odd_settings_are_refused():
    config = dataclasses.replace(TINY, max_position=32)
    found = log_likelihoods(random_params(config), config, [([1] * 16, [2] * 17)])
    assert len(found[0].token_log_probs) == 17
    with pytest.raises(InputError, match="num_top between 0 and 101, got 102"):
        log_likelihoods({}, config, [], num_top=102)
