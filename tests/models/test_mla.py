"""Latent attention against the equations of the code released with DeepSeek-V2, and its cache."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.core.precision import TOLERANCE
from moejax.models import mla as mla_module
from moejax.models import transformer
from moejax.models.cache import init_cache
from moejax.models.config import AttentionConfig, ModelConfig
from moejax.models.families import by_name
from moejax.models.mha import AttentionInputs
from moejax.models.mla import MLAConfig, mla, mla_shapes, yarn_softmax_scale
from moejax.ops.attention import AttentionSpec
from moejax.ops.attention_spec import Visible
from moejax.ops.rope import RopeConfig, frequencies, rotation
from moejax.serve.generate import GenerateConfig, generate
from tests.draws import model_params

YARN = RopeConfig(1e4, "yarn", 40.0, original_max_position=4096, mscale=0.707, mscale_all_dim=0.707)
ROPES = {
    "plain": RopeConfig(),
    "released": YARN,
    "unlike mscales": dataclasses.replace(YARN, mscale=0.5, mscale_all_dim=1.3, beta_fast=4.0),
    "no mscales": dataclasses.replace(YARN, mscale=0.0, mscale_all_dim=0.0, factor=4.0),
}
HEADS, WIDTH, TOKENS = 3, 20, 30


def released_rope(rope: RopeConfig, size: int) -> tuple[np.ndarray, np.ndarray, float]:
    """cos, sin [T, P] and the softmax's mscale, as `DeepseekV2YarnRotaryEmbedding` makes them."""

    def mscale_of(scale: float, mscale: float) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    freqs = 1.0 / rope.theta ** (np.arange(0, size, 2) / size)
    amplitude = softmax_mscale = 1.0
    if rope.kind == "yarn":
        slow, fast = freqs / rope.factor, freqs

        def dim_of(turns: float) -> float:
            ratio = rope.original_max_position / (turns * 2 * math.pi)
            return size * math.log(ratio) / (2 * math.log(rope.theta))

        low = max(math.floor(dim_of(rope.beta_fast)), 0)
        high = min(math.ceil(dim_of(rope.beta_slow)), size - 1)
        high = high + 0.001 if low == high else high
        keep = 1 - np.clip((np.arange(size // 2) - low) / (high - low), 0, 1)
        freqs = slow * (1 - keep) + fast * keep
        # config.json's defaults there: mscale 1, mscale_all_dim 0.
        above = mscale_of(rope.factor, rope.mscale or 1.0)
        amplitude = above / mscale_of(rope.factor, rope.mscale_all_dim)
        if rope.mscale_all_dim:
            softmax_mscale = mscale_of(rope.factor, rope.mscale_all_dim)
    angles = np.outer(np.arange(TOKENS), freqs)
    both = np.concatenate([angles, angles], axis=1)
    return np.cos(both) * amplitude, np.sin(both) * amplitude, softmax_mscale


def released_attention(params, x, config: MLAConfig, rope: RopeConfig) -> np.ndarray:
    """`DeepseekV2Attention.forward` in float64 for one row x [T, D]; weights laid out as ours."""

    def norm(y, scale):
        return y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-6) * scale

    def turn(y):  # [..., T, P]: channels 2i go first, 2i + 1 last, then halves are rotated
        y = np.concatenate([y[..., 0::2], y[..., 1::2]], axis=-1)
        half = y.shape[-1] // 2
        return y * cos + np.concatenate([-y[..., half:], y[..., :half]], axis=-1) * sin

    cos, sin, mscale = released_rope(rope, config.rope_size)
    if config.q_rank is None:
        q = np.einsum("td,dhc->htc", x, params["w_q"])
    else:
        down = norm(x @ params["w_q_down"] + params["b_q_down"], params["q_norm"]["scale"])
        q = np.einsum("tq,qhc->htc", down, params["w_q_up"])
    compressed = x @ params["w_kv_down"] + params["b_kv_down"]
    latent, k_rope = np.split(compressed, [config.kv_rank], axis=-1)
    kv = np.einsum("tr,rhc->htc", norm(latent, params["kv_norm"]["scale"]), params["w_kv_up"])
    n = config.nope_size
    q = np.concatenate([q[..., :n], turn(q[..., n:])], axis=-1)
    shared = np.broadcast_to(turn(k_rope), (*kv.shape[:2], config.rope_size))
    k, v = np.concatenate([kv[..., :n], shared], axis=-1), kv[..., n:]
    scores = np.einsum("htc,hsc->hts", q, k) * config.head_size**-0.5 * mscale * mscale
    scores = np.where(np.tri(TOKENS, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = np.einsum("hts,hsc->thc", weights, v)
    return np.einsum("thc,hcd->td", mixed, params["w_o"]) + params["b_o"]


def draw_params(config: MLAConfig) -> dict:
    rng = np.random.default_rng(0)
    params: dict = {}
    for path, shape in mla_shapes(WIDTH, HEADS, config, bias=True).items():
        value = rng.normal(size=shape) * 2 / np.sqrt(WIDTH)
        name, *scale = path.split("/")
        params[name] = {"scale": 1 + value} if scale else value
    return params


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("q_rank", [None, 9])
def test_it_is_the_released_attention(rope, q_rank):
    config = MLAConfig(kv_rank=10, q_rank=q_rank, nope_size=6, rope_size=8, v_size=5)
    params = draw_params(config)
    x = np.random.default_rng(1).normal(size=(2, TOKENS, WIDTH))
    scale = yarn_softmax_scale(rope, config.head_size)

    @jax.jit
    def ours(params, x_BTD):
        positions_BT = jnp.broadcast_to(jnp.arange(TOKENS), (2, TOKENS))
        turn = rotation(positions_BT, frequencies(rope, config.rope_size), rope.amplitude)
        inputs = AttentionInputs(turn, Visible(), AttentionSpec(scale=scale), 1.0)
        return mla(config, params, x_BTD, inputs, lambda k, v: (k, v, None))[0]

    found = np.asarray(ours(jax.tree.map(jnp.float32, params), jnp.float32(x)))
    expected = np.stack([released_attention(params, row, config, rope) for row in x])
    assert np.max(np.abs(found - expected)) < TOLERANCE["float32"] * np.max(np.abs(expected))


SIZES = MLAConfig(kv_rank=12, q_rank=None, nope_size=6, rope_size=4, v_size=5)
MODEL = ModelConfig("deepseek_v2", 50, 3, 32, 48, 4, 4, 10, mla=SIZES)


@pytest.mark.parametrize("absorbed", [True, False])
def test_a_cached_row_is_the_whole_row_in_either_form(absorbed, monkeypatch):
    monkeypatch.setattr(mla_module, "_is_absorbing_cheaper", lambda *sizes: absorbed)
    config = dataclasses.replace(MODEL, attention=AttentionConfig(windows=(0, 3)))
    params = model_params(config)
    tokens_BT = np.random.default_rng(0).integers(0, 50, (2, 9)).astype(np.int32)
    padding = 3  # the second row is so much shorter, and padded on the left

    @jax.jit
    def both(params):
        short = tokens_BT[1:, padding:]
        whole = [transformer.logits(params, config, t) for t in (tokens_BT[:1], short)]
        cache = init_cache(config, jnp.array([0, padding]), 9)
        found = []
        for first, last in ((0, 5), (5, 6), (6, 9)):
            out = transformer.forward(params, config, tokens_BT[:, first:last], cache=cache)
            cache = out.cache
            found.append(transformer.unembed(params, config, out.hidden_BTD))
        return whole, jnp.concatenate(found, axis=1)

    (first, second), found = jax.tree.map(np.asarray, both(params))
    for row, expected in ((found[0], first[0]), (found[1, padding:], second[0])):
        assert np.max(np.abs(row - expected)) < TOLERANCE["float32"] * np.max(np.abs(expected))


def test_split_layers_decode_the_same():
    params = model_params(MODEL)
    tokens_BT = np.random.default_rng(0).integers(0, 50, (2, 6)).astype(np.int32)

    @jax.jit
    def run(params):
        found = []
        for split in (False, True):
            layers = transformer.split_layers(params) if split else params
            cache = init_cache(MODEL, jnp.zeros(2, jnp.int32), 8, split=split)
            for part in (tokens_BT[:, :5], tokens_BT[:, 5:]):
                out = transformer.forward(layers, MODEL, part, cache=cache)
                cache = out.cache
            found.append(out.hidden_BTD)
        return found

    one, other = map(np.asarray, run(params))
    assert np.max(np.abs(one - other)) < TOLERANCE["float32"] * np.max(np.abs(one))


def test_the_cache_holds_one_vector_per_token_and_layer_whatever_the_heads():
    whole = by_name("deepseek_v2").presets["deepseek-v2"]
    start = jax.ShapeDtypeStruct((1,), "int32")
    cache = jax.eval_shape(lambda s: init_cache(whole, s, 128, dtype="bfloat16"), start)
    held = sum(a.size for part in (cache.k, cache.v) for a in part.values())
    assert held == 128 * whole.num_layers * (512 + 64)
    plain = 128 * whole.num_layers * 2 * whole.num_heads * 128
    assert held < plain / 50


def test_decoding_is_absorbed_and_long_prompts_are_not():
    whole = by_name("deepseek_v2").presets["deepseek-v2"].mla
    assert mla_module._is_absorbing_cheaper(whole, 1, 4096)
    assert mla_module._is_absorbing_cheaper(whole, 32, 4096)
    assert not mla_module._is_absorbing_cheaper(whole, 4096, 4096)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_size": 12}, "head_size must be 10, got 12"),
        ({"num_kv_heads": 2}, "num_kv_heads must be 4, got 2"),
        ({"attention": AttentionConfig(qk_norm="head")}, "neither soft cap, qk_norm"),
    ],
)
def test_a_config_that_contradicts_its_latent_attention_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(MODEL, **change)
    with pytest.raises(InputError, match="rope_size must be even, got 3"):
        MLAConfig(rope_size=3)
    with pytest.raises(InputError, match="mscale 0.7 and mscale_all_dim 0.0"):
        yarn_softmax_scale(dataclasses.replace(YARN, mscale=0.7, mscale_all_dim=0.0), 10)


def test_generation_continues_with_the_most_likely_tokens():
    params = model_params(MODEL)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    answers = generate(params, MODEL, prompts, GenerateConfig(max_new_tokens=4))
    rows = [[*p, *a.ids] for p, a in zip(prompts, answers, strict=True)]
    size = max(map(len, rows))
    # Causal: what fills the shorter row up comes after all that is compared.
    tokens_BT = np.array([row + [0] * (size - len(row)) for row in rows], np.int32)
    logits = np.asarray(jax.jit(lambda p: transformer.logits(p, MODEL, tokens_BT))(params))
    for row, prompt, answer in zip(logits, prompts, answers, strict=True):
        assert row[len(prompt) - 1 :][:4].argmax(-1).tolist() == answer.ids
