"""Distillation: a student learns a teacher's distribution over the next token, or its states.

    forward    KL(p_teacher || p_student)         (Hinton et al., arXiv 1503.02531)
    reverse    KL(p_student || p_teacher)         (MiniLLM, arXiv 2306.08543)
    jsd        b KL(p_t || m) + (1 - b) KL(p_s || m),  m = b p_t + (1 - b) p_s
               (GKD, arXiv 2306.13649, on texts that the student wrote itself)

Both models must have one vocabulary. In nats per token, temperature 1.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.models.transformer import unembed

DIVERGENCES = ("forward", "reverse", "jsd")
MAX_LOGIT_BYTES = 128 * 2**20


def divergence(
    kind: str, student_V: jax.Array, teacher_V: jax.Array, beta: float = 0.5
) -> jax.Array:
    """The divergence of two rows of logits [..., V], summed over V.

    Errors: InputError for an unknown kind, or a beta of "jsd" that is not between 0 and 1.
    """
    if kind not in DIVERGENCES:
        raise InputError(f"divergence {kind!r} is unknown: use {', '.join(DIVERGENCES)}")
    s, t = jax.nn.log_softmax(student_V), jax.nn.log_softmax(teacher_V)
    if kind == "forward":
        return _kl(t, s)
    if kind == "reverse":
        return _kl(s, t)
    if not 0 < beta < 1:
        raise InputError(f"beta={beta} of the JSD must lie between 0 and 1")
    mixed = jnp.logaddexp(t + math.log(beta), s + math.log1p(-beta))
    return beta * _kl(t, mixed) + (1 - beta) * _kl(s, mixed)


def _kl(p: jax.Array, q: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def token_divergence(
    kind: str,
    student: tuple[tree.Tree, ModelConfig, jax.Array],
    teacher: tuple[tree.Tree, ModelConfig, jax.Array],
    beta: float = 0.5,
    max_logit_bytes: int = MAX_LOGIT_BYTES,
) -> jax.Array:
    """Per token, float32 [B, T]; each side is (parameters with the head, config, hidden [B, T, D]).

    Time is cut into chunks whose logits fit in `max_logit_bytes` and are made again backwards, so
    neither model's logits of a whole batch ever exist. The teacher gets no gradient.
    """
    (s_params, s_config, s_BTD), (t_params, t_config, t_BTD) = student, teacher
    if s_config.vocab_size != t_config.vocab_size:
        raise InputError(
            f"distillation needs one vocabulary: the teacher has {t_config.vocab_size} ids and "
            f"the student {s_config.vocab_size}"
        )
    t_params = jax.lax.stop_gradient(t_params)

    def piece(s, t):
        t_logits = unembed(t_params, t_config, jax.lax.stop_gradient(t))
        return divergence(kind, unembed(s_params, s_config, s), t_logits, beta)

    num_batch, num_tokens = s_BTD.shape[:2]
    chunk = max(1, max_logit_bytes // (4 * num_batch * s_config.vocab_size))
    chunk = -(-num_tokens // -(-num_tokens // chunk))
    pad = -num_tokens % chunk

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pad), (0, 0)))
        return jnp.moveaxis(x.reshape(num_batch, -1, chunk, x.shape[-1]), 1, 0)

    found = jax.lax.map(
        lambda xs: jax.checkpoint(piece, prevent_cse=False)(*xs), (cut(s_BTD), cut(t_BTD))
    )
    return jnp.moveaxis(found, 0, 1).reshape(num_batch, -1)[:, :num_tokens]


def state_distance(projected_BTD: jax.Array, teacher_BTD: jax.Array) -> jax.Array:
    """|P h - r|^2 / |r|^2 per token [B, T]: hidden states, brought to the teacher's size by P."""
    teacher = jax.lax.stop_gradient(teacher_BTD.astype(jnp.float32))
    error = jnp.sum(jnp.square(projected_BTD.astype(jnp.float32) - teacher), -1)
    return error / jnp.maximum(jnp.sum(jnp.square(teacher), -1), 1e-6)
