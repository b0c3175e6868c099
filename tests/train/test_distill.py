"""Distillation: the divergences against their definition, chunks against one piece."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from moejax.core.errors import InputError
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.train.distill import divergence, state_distance, token_divergence

CONFIG = ModelConfig("llama", 23, 1, 8, 12, 2, 1, 4, max_position=16, tie_embeddings=True)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_divergences_are_the_definitions(kind):
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 3, 11)) * 3
    p, q = softmax(t, -1), softmax(s, -1)
    mixed = 0.3 * p + 0.7 * q
    wanted = {
        "forward": rel_entr(p, q).sum(-1),
        "reverse": rel_entr(q, p).sum(-1),
        "jsd": 0.3 * rel_entr(p, mixed).sum(-1) + 0.7 * rel_entr(q, mixed).sum(-1),
    }
    found = divergence(kind, jnp.asarray(s), jnp.asarray(t), 0.3)
    np.testing.assert_allclose(found, wanted[kind], rtol=2e-5)
    np.testing.assert_allclose(divergence(kind, jnp.asarray(s), jnp.asarray(s), 0.3), 0, atol=1e-6)


def test_chunks_change_neither_value_nor_gradient_and_the_teacher_has_none():
    keys = jax.random.split(jax.random.key(0), 4)
    student, teacher = (transformer.init_params(CONFIG, k) for k in keys[:2])
    s, t = (jax.random.normal(k, (2, 7, 8)) for k in keys[2:])

    def total(student, teacher, size):
        return token_divergence(
            "forward", (student, CONFIG, s), (teacher, CONFIG, t), max_logit_bytes=size
        ).sum()

    whole = jax.value_and_grad(total)(student, teacher, 2**30)
    parts, pulled = jax.value_and_grad(total, (0, 1))(student, teacher, 2 * 4 * 23 * 3)
    np.testing.assert_allclose(parts, whole[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(pulled[0]), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert all(not np.any(x) for x in jax.tree.leaves(pulled[1]))
    assert any(np.any(x) for x in jax.tree.leaves(pulled[0]))


def test_states_are_compared_by_their_own_size():
    r = jnp.ones((1, 2, 4))
    np.testing.assert_allclose(state_distance(jnp.zeros((1, 2, 4)), r), [[1, 1]])
    np.testing.assert_allclose(state_distance(r, r), [[0, 0]])


def test_what_cannot_be_compared():
    with pytest.raises(InputError, match="one vocabulary"):
        other = dataclasses.replace(CONFIG, vocab_size=24)
        x = jnp.zeros((1, 2, 8))
        token_divergence("forward", ({}, CONFIG, x), ({}, other, x))
    with pytest.raises(InputError, match="unknown"):
        divergence("sideways", jnp.zeros(3), jnp.zeros(3))
    with pytest.raises(InputError, match="between 0 and 1"):
        divergence("jsd", jnp.zeros(3), jnp.zeros(3), 1.0)
