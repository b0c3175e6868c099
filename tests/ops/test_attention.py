"""Every implementation equals the definition, forward and gradient; norms equal their equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.precision import TOLERANCE
from moejax.ops.attention import (
    IMPLEMENTATIONS,
    AttentionSpec,
    Visible,
    attention,
    choose,
    cudnn_can,
    dense_attention,
    shared_mask,
)
from moejax.ops.attention_blockwise import blockwise_attention
from moejax.ops.norm import layer_norm, rms_norm, rms_norm_delta

SIZES = {"heads": 4, "groups": 2, "size": 6, "value_size": 6}
WAYS = {
    "dense": dense_attention,
    "blockwise": functools.partial(blockwise_attention, block=16),
    "jax": IMPLEMENTATIONS["jax"],
    "splash": IMPLEMENTATIONS["splash"],
}
CASES = {
    "causal": {},
    "window": {"window": 7},
    "soft_cap": {"soft_cap": 2.0, "scale": 0.3},
    "segments_window": {"segments": True, "window": 11},
    "all": {"segments": True, "window": 9, "soft_cap": 1.5, "heads": 3, "groups": 1, "size": 10},
    "value_size": {"value_size": 9, "groups": 4, "size": 5},
}


def reference(q, k, v, sees, scale, soft_cap):
    """Softmax attention, one query of one head at a time, in float64."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    share = q.shape[2] // k.shape[1]
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(sees[b, t])
        scores = k[b, h // share, seen] @ q[b, t, h] * scale
        if soft_cap:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = (weights / weights.sum()) @ v[b, h // share, seen]
    return out


def arrays(num_tokens, heads, groups, size, value_size):
    rng = np.random.default_rng(heads)
    shapes = {
        "q": (2, num_tokens, heads, size),
        "k": (2, groups, num_tokens, size),
        "v": (2, groups, num_tokens, value_size),
        "weight": (2, num_tokens, heads, value_size),
    }
    segments = np.sort(rng.integers(0, 3, (2, num_tokens)), axis=1).astype(np.int32)
    return [rng.normal(size=s).astype(np.float32) for s in shapes.values()], segments


def sees(num_tokens, window, segments):
    slots = np.arange(num_tokens)
    gap = slots[:, None] - slots
    mask = (gap >= 0) & (gap < (window or num_tokens))
    return mask[None] & (segments[:, :, None] == segments[:, None])


@functools.cache
def expected(case, num_tokens):
    settings = SIZES | {"window": 0, "soft_cap": None, "segments": False, "scale": None}
    settings |= CASES[case]
    (q, k, v, weight), segments = arrays(num_tokens, *(settings[name] for name in SIZES))
    settings["scale"] = settings["scale"] or settings["size"] ** -0.5
    segments = segments if settings["segments"] else 0 * segments
    mask = sees(num_tokens, settings["window"], segments)
    out = reference(
        *(x.astype(np.float64) for x in (q, k, v)), mask, settings["scale"], settings["soft_cap"]
    )
    visible = Visible(segments_BT=jnp.asarray(segments) if settings["segments"] else None)
    return (q, k, v, weight), visible, settings, out


def gap(found, wanted):
    return np.max(np.abs(np.asarray(found) - wanted)) / np.max(np.abs(wanted))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_every_way_equals_the_definition(case, way):
    """The output is held against float64, the gradients against those of the plainest way."""
    num_tokens = 128 if way == "splash" else 37
    (q, k, v, weight), visible, settings, out = expected(case, num_tokens)

    def run(compute):
        def loss(q, k, v):
            found = compute(
                q, k, v, visible, settings["window"], settings["scale"], settings["soft_cap"]
            )
            return jnp.sum(found * weight), found

        grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        (_, found), grads = jax.jit(grad)(q, k, v)
        return found, grads

    sizes = settings["size"] == settings["value_size"]
    if way == "jax" and (settings["soft_cap"] or not sizes):
        lacks = "soft cap" if settings["soft_cap"] else "one size"
        with pytest.raises(NotImplementedError, match=lacks):
            run(WAYS[way])
        return
    found, grads = run(WAYS[way])
    assert gap(found, out) <= TOLERANCE["float32"]
    if way != "dense":
        for ours, theirs in zip(grads, run(dense_attention)[1], strict=True):
            assert gap(ours, theirs) <= TOLERANCE["float32"]


@pytest.mark.parametrize("name", ["dense", "blockwise", "splash"])
def test_a_window_may_be_known_only_when_it_runs(name):
    (q, k, v, _), visible, _, _ = expected("causal", 128)
    spec = AttentionSpec(windows=(0, 5), implementation=name)
    run = jax.jit(lambda window: attention(q, k, v, visible, window, spec))
    for window in (0, 5):
        wanted = dense_attention(q, k, v, visible, window, 6**-0.5, None)
        assert gap(run(jnp.int32(window)), wanted) <= TOLERANCE["float32"]


@pytest.mark.parametrize("window", [0, 4])
def test_queries_into_a_cache(window):
    """Queries in slots 9 to 21 of 40, the second row with 3 slots of padding before its text."""
    (_, k, v, _), _, _, _ = expected("causal", 37)
    q = arrays(13, 4, 2, 6, 6)[0][0]
    visible = Visible(slot=jnp.int32(9), start_B=jnp.asarray([0, 3]))
    mask = sees(37, window, np.zeros((2, 37)))[:, 9:22].repeat(2, 0)
    mask[1, :, :3] = False
    wanted = reference(q, k, v, mask, 0.5, None)
    for name in ("dense", "blockwise"):
        compute = jax.jit(WAYS[name], static_argnums=(4, 5, 6))
        assert gap(compute(q, k, v, visible, window, 0.5, None), wanted) < TOLERANCE["float32"]


def test_a_row_that_sees_nothing_is_finite():
    q = jnp.ones((1, 2, 2, 4))
    visible = Visible(slot=jnp.int32(0), start_B=jnp.asarray([9]))
    for name in ("dense", "blockwise"):
        out = attention(q, q, q, visible, spec=AttentionSpec(implementation=name))
        assert bool(jnp.isfinite(out).all())


def test_which_way_is_chosen_and_which_is_refused():
    cached = Visible(slot=jnp.int32(0))
    assert choose((1, 128, 8), 128, Visible(), "cpu") == "dense"
    assert choose((1, 512, 8), 512, Visible(), "cpu") == "blockwise"
    assert choose((1, 512, 8), 512, cached, "cpu") == "dense"
    assert choose((1, 512, 8), 512, Visible(), "gpu") == "dense"
    assert choose((1, 32768, 8), 32768, Visible(), "gpu") == "blockwise"
    packed = Visible(segments_BT=jnp.ones((1, 4096), jnp.int32))
    for seen, fused, devices, name in (
        (Visible(), True, 1, "cudnn"),
        (packed, True, 1, "cudnn"),
        (Visible(), False, 1, "dense"),
        (Visible(), True, 8, "dense"),
        (cached, True, 1, "dense"),
    ):
        assert choose((1, 4096, 8), 4096, seen, "gpu", devices, fused) == name
    assert choose((1, 32768, 8), 32768, packed, "gpu", 1, True) == "blockwise"
    assert not cudnn_can(64, 64, jnp.bfloat16, None)  # there is no GPU to ask
    assert choose((1, 4096, 8), 4096, Visible(), "tpu") == "splash"
    assert choose((1, 4096, 8), 4096, Visible(), "tpu", 8) == "dense"
    assert choose((1, 4096, 8), 4096, cached, "tpu") == "dense"
    visible, spec = shared_mask(Visible(), AttentionSpec(), (1, 4, 8), 4)
    assert spec.implementation == "dense" and visible.mask_BTS.shape == (1, 4, 4)
    q = jnp.ones((1, 4, 2, 4))
    with pytest.raises(NotImplementedError, match="multiple of 128 tokens, got 4"):
        attention(q, q, q, Visible(), spec=AttentionSpec(implementation="splash"))
    with pytest.raises(ValueError, match="flash3.*dense, blockwise"):
        attention(q, q, q, Visible(), spec=AttentionSpec(implementation="flash3"))


def test_blockwise_memory_is_linear_in_the_text():
    def temp_bytes(num_tokens):
        q = jax.ShapeDtypeStruct((1, num_tokens, 2, 8), jnp.float32)
        k = jax.ShapeDtypeStruct((1, 2, num_tokens, 8), jnp.float32)
        run = jax.grad(lambda q, k, v: jnp.sum(WAYS["blockwise"](q, k, v, Visible(), 0, 1.0, None)))
        return jax.jit(run).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes

    assert temp_bytes(4096) < 2.2 * temp_bytes(2048)


def test_norms_equal_their_equations():
    x = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    scale, bias = np.linspace(0.5, 2, 16, dtype=np.float32), np.linspace(-1, 1, 16)
    root = np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(rms_norm(x, jnp.asarray(scale), 1e-6), x / root * scale, rtol=1e-5)
    found = rms_norm_delta(x, jnp.asarray(scale), 1e-6)
    np.testing.assert_allclose(found, x / root * (1 + scale), rtol=1e-5)
    centred = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(jnp.asarray(x), 1e-6), centred, rtol=1e-4, atol=1e-6)
    found = layer_norm(jnp.asarray(x), 1e-6, jnp.asarray(scale), jnp.asarray(bias))
    np.testing.assert_allclose(found, centred * scale + bias, rtol=1e-4, atol=1e-5)
