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
    RopeConfig(10000.0, "yarn", 4.0, original_max_position=32),
]


def turned(x, positions, rope):
    freqs = frequencies(rope, x.shape[-1], positions.max() + 1)
    cos, sin = rotation(positions, freqs, rope.amplitude)
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
    longer = rope.amplitude * jnp.linalg.norm(q)
    np.testing.assert_allclose(jnp.linalg.norm(tq), longer, rtol=1e-5)


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


def test_yarn_keeps_fast_channels_and_stretches_slow_ones():
    """Channels 0 and 31 turn 1304 and 0.17 times over the original length: above 32, below 1."""
    rope = RopeConfig(1e4, "yarn", 4.0, original_max_position=8192)
    plain, scaled = frequencies(RopeConfig(1e4), 64), frequencies(rope, 64)
    np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(scaled[-1], plain[-1] / 4, rtol=1e-6)
    assert rope.amplitude == pytest.approx(0.1 * np.log(4) + 1)
    deepseek = RopeConfig(1e4, "yarn", 4.0, original_max_position=8, mscale=0.7, mscale_all_dim=1.0)
    assert deepseek.amplitude == pytest.approx((0.07 * np.log(4) + 1) / (0.1 * np.log(4) + 1))


@pytest.mark.parametrize(
    "change,needs",
    [
        ({"kind": "longrope"}, "'longrope' is unknown: use default, linear"),
        ({"kind": "llama3"}, "original_max_position >= 1, got 0"),
        ({"kind": "yarn"}, "original_max_position >= 1, got 0"),
        ({"kind": "linear", "factor": 0.5}, "factor >= 1, got 0.5"),
        ({"theta": 0.0}, "theta must be above 0, got 0.0"),
        (
            {"kind": "llama3", "original_max_position": 8, "low_freq_factor": 5.0},
            "low_freq_factor < high_freq_factor, got 5.0 and 4.0",
        ),
        (
            {"kind": "yarn", "original_max_position": 8, "beta_slow": 40.0},
            "beta_slow <= beta_fast, got 40.0 and 32.0",
        ),
    ],
)
def test_bad_configs_are_named(change, needs):
    with pytest.raises(InputError, match=needs):
        RopeConfig(**({"theta": 1e4, "factor": 2.0} | change))
