import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.ops.rope import RopeConfig, apply_rope, frequencies, rotation

KINDS = [
    RopeConfig(10000.0),
    RopeConfig(100000.0, "linear", 4.0),
    RopeConfig(10000.0, "dynamic", 2.0, original_max_position=8),
    RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, original_max_position=64),
]


def turned(x, positions, rope):
    cos, sin = rotation(positions, frequencies(rope, x.shape[-1], positions.max() + 1))
    return apply_rope(x, cos, sin)


@pytest.mark.parametrize("rope", KINDS, ids=lambda r: r.kind)
def test_scores_depend_on_distance_alone(rope):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    positions = jnp.asarray([[0, 3, 10, 13]])
    q, k = (jnp.broadcast_to(x, (1, 4, 1, 16)) for x in (q, k))
    tq, tk = turned(q, positions, rope), turned(k, positions, rope)
    near = jnp.vdot(tq[0, 1], tk[0, 0])
    far = jnp.vdot(tq[0, 3], tk[0, 2])
    np.testing.assert_allclose(near, far, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(tq), jnp.linalg.norm(q), rtol=1e-5)


def test_default_frequencies_are_the_paper_s():
    np.testing.assert_allclose(frequencies(RopeConfig(10000.0), 4), [1.0, 0.01], rtol=1e-6)


def test_linear_divides_positions():
    plain, linear = RopeConfig(1e4), RopeConfig(1e4, "linear", 4.0)
    np.testing.assert_allclose(frequencies(linear, 8) * 4, frequencies(plain, 8), rtol=1e-6)


def test_dynamic_changes_nothing_until_the_text_is_longer_and_is_per_row():
    rope = KINDS[2]
    rows = frequencies(rope, 8, jnp.asarray([3, 8, 16]))
    plain = frequencies(RopeConfig(1e4), 8)
    np.testing.assert_allclose(rows[0], plain, rtol=1e-6)
    np.testing.assert_allclose(rows[1], plain, rtol=1e-6)
    assert rows[2, -1] < plain[-1]
    # theta * (2 * 16 / 8 - 1)^(8/6), by hand.
    theta = 1e4 * 3 ** (8 / 6)
    np.testing.assert_allclose(rows[2, 1], theta ** (-2 / 8), rtol=1e-5)


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    rope = KINDS[3]
    plain, scaled = frequencies(RopeConfig(5e5), 64), frequencies(rope, 64)
    np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(scaled[-1], plain[-1] / 8, rtol=1e-6)


@pytest.mark.parametrize("kind,needs", [("yarn", "unknown"), ("llama3", "original_max_position")])
def test_bad_configs_are_named(kind, needs):
    with pytest.raises(InputError, match=needs):
        RopeConfig(1e4, kind, 2.0)
