"""Criteria: a gate's derivative, inside experts too, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.methods import shadow_scores
from moejax.methods.shadow_measure import Asked, measure
from moejax.models import transformer
from moejax.moe.config import MoEConfig
from tests.shadow_cases import LLAMA, PROMPT, TEXT, TOKENS, F, H, L


def same(got, want):
    """Equal up to float32's rounding."""
    want = np.array(want)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("num_dense", [0, 1])
def test_gates_derivative_is_snip(num_dense):
    """|dLoss/dm| by differences, of heads and experts' neurons; none of a dense layer's before."""
    from moejax.models.masked import masking

    config = dataclasses.replace(LLAMA, moe=MoEConfig(3, 2), num_dense_layers=num_dense)
    params = transformer.init_params(config, jax.random.key(0))
    found = measure(params, config, TEXT, Asked(("snip",)), len(TOKENS))
    assert found["neurons"]["snip"].shape == (L, 3 * F)

    def loss(heads, neurons):
        logits = transformer.logits(
            params, config, TOKENS[None], inserted=masking(config, heads, neurons)
        )
        picked = jax.nn.log_softmax(logits[0, PROMPT - 1 : -1])
        return -picked[np.arange(len(TOKENS) - PROMPT), TOKENS[PROMPT:]].mean()

    ones = np.ones((L, 1, H), np.float32), np.ones((L, 1, 3, F), np.float32)
    heads, neurons = jax.jit(jax.grad(loss, (0, 1)))(*ones)
    same(found["heads"]["snip"], np.abs(heads[:, 0]))
    same(found["neurons"]["snip"], np.abs(neurons[:, 0]).reshape(L, -1))
    assert not found["neurons"]["snip"][:num_dense].any()


def test_jacov_of_a_short_answer_counts_each_token_once():
    """Three tokens for eight rows: their own figure, and a constant for each row too many."""
    g = np.random.default_rng(0).standard_normal((3, 2, 16)).astype(np.float32)
    at = np.asarray(shadow_scores.evenly(0, 3, 8))
    assert sorted(set(at.tolist())) == [0, 1, 2] and (np.diff(at) >= 0).all()
    found = shadow_scores.jacov(g[at], np.diff(at, prepend=-1) > 0)
    for head in range(2):
        v = np.linalg.eigvalsh(np.corrcoef(g[:, head].astype(np.float64)))
        v = np.concatenate([v, np.ones(5)])
        np.testing.assert_allclose(found[head], -np.sum(np.log(v + 1e-5) + 1 / (v + 1e-5)), 1e-4)


def test_a_neuron_that_always_fires_has_a_finite_score_as_the_reference_counts():
    x = np.array([[1.0, -1.0], [2.0, 3.0]], np.float32)
    found = shadow_scores.nwot(x, np.ones(2, bool), parity=True)
    np.testing.assert_allclose(found, np.log([0.25, 0.5]), rtol=1e-6)


def test_bad_input():
    params = transformer.init_params(LLAMA, jax.random.key(3))
    unscored = dataclasses.replace(TEXT, scored=np.zeros(len(TOKENS), bool))
    with pytest.raises(InputError, match="epenas needs labels"):
        measure(params, LLAMA, unscored, Asked(("l2_norm", "epenas")), 24)
    assert measure(params, LLAMA, unscored, Asked(("l2_norm", "nwot")), 24)["heads"].keys() == {
        "l2_norm",
        "nwot",
    }
    with pytest.raises(InputError, match="more than the 8"):
        measure(params, LLAMA, TEXT, Asked(), 8)
    with pytest.raises(InputError, match="unknown"):
        Asked(("magnitude",))
