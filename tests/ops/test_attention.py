import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.precision import TOLERANCE
from moejax.ops.attention import attention
from moejax.ops.norm import rms_norm


def reference(q, k, v, mask):
    """Softmax attention, one query of one head at a time, in float64."""
    out = np.zeros(q.shape)
    share = q.shape[2] // k.shape[1]
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(mask[b, t])
        scores = k[b, h // share, seen] @ q[b, t, h] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = (weights / weights.sum()) @ v[b, h // share, seen]
    return out


@pytest.mark.parametrize("heads,groups,size", [(4, 4, 8), (6, 2, 6), (3, 1, 10)])
def test_attention_equals_its_definition(heads, groups, size):
    rng = np.random.default_rng(heads)
    q = rng.normal(size=(2, 5, heads, size))
    k, v = rng.normal(size=(2, 2, groups, 7, size))
    mask = rng.random((2, 5, 7)) < 0.6
    mask[:, :, 0] = True
    q, k, v = (np.asarray(x, np.float32) for x in (q, k, v))
    got = attention(*map(jnp.asarray, (q, k, v, mask)))
    expected = reference(*(x.astype(np.float64) for x in (q, k, v)), mask)
    assert np.max(np.abs(got - expected)) <= TOLERANCE["float32"] * np.max(np.abs(expected))


def test_a_row_that_may_look_nowhere_is_finite():
    q = jnp.ones((1, 2, 2, 4))
    out = attention(q, q, q, jnp.zeros((1, 2, 2), bool))
    assert bool(jnp.isfinite(out).all())


def test_rms_norm_equals_its_equation():
    x = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    scale = np.linspace(0.5, 2, 16, dtype=np.float32)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * scale
    got = rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-6)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
