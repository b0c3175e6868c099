import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.precision import TOLERANCE
from moejax.models import linen
from moejax.models import transformer as tf
from moejax.models.cache import init_cache
from moejax.models.config import AttentionConfig, EmbeddingConfig, ModelConfig, NormConfig
from moejax.moe.config import MoEConfig
from moejax.ops.rope import RopeConfig

TINY = ModelConfig("llama", 61, 2, 24, 40, 4, 2, 6, rope=RopeConfig(1e4), max_position=64)
CONFIGS = {
    "gqa": TINY,
    "tied-biases-llama3": dataclasses.replace(
        TINY,
        tie_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        num_kv_heads=4,
        rope=RopeConfig(1e4, "llama3", 8.0, original_max_position=16),
    ),
    "windows-caps-sandwich": dataclasses.replace(
        TINY,
        num_layers=3,
        attention=AttentionConfig((3, 0), 0.3, 5.0, "all"),
        norms=NormConfig("rms_delta", "sandwich"),
        embedding=EmbeddingConfig(scaled=True, logit_soft_cap=4.0),
    ),
    "learned-post-plain": dataclasses.replace(
        TINY,
        head_size=7,
        attention=AttentionConfig((0, 2), qk_norm="head", output_bias=True),
        norms=NormConfig("layer", "post", final=False),
        embedding=EmbeddingConfig("learned", 2, size=10),
        gated=False,
    ),
    "dense-first-moe": dataclasses.replace(
        TINY,
        num_layers=3,
        moe=MoEConfig(4, 3, noise=False),
        num_dense_layers=1,
        attention=AttentionConfig((0, 3)),
    ),
    "moe-biases": dataclasses.replace(TINY, mlp_bias=True, moe=MoEConfig(4, 3)),
}


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    config = dataclasses.replace(CONFIGS[request.param], initializer_range=0.3)
    params = tf.init_params(config, jax.random.key(0))
    # Biases start at zero: move them, or they would test nothing.
    return config, tree.map_with_path(
        lambda p, x: x + 0.1 * jax.random.normal(jax.random.key(len(p)), x.shape), params
    )


@functools.partial(jax.jit, static_argnames=("config", "options"))
def run(params, config, tokens, **kwargs):
    return tf.forward(params, config, tokens, **kwargs)


def tokens_of(shape, seed=1):
    return jax.random.randint(jax.random.key(seed), shape, 0, TINY.vocab_size)


def assert_close(got, expected):
    gap = np.max(np.abs(np.asarray(got) - np.asarray(expected)))
    assert gap <= TOLERANCE["float32"] * np.max(np.abs(expected)), gap


@pytest.mark.parametrize("split", [False, True], ids=["scanned", "split"])
def test_cached_equals_full(model, split):
    config, params = model
    tokens = tokens_of((2, 11))
    full = run(params, config, tokens).hidden_BTD
    layers = tf.split_layers(params) if split else params
    cache = init_cache(config, jnp.zeros(2, jnp.int32), 13, split=split)
    pieces = []
    for start, stop in ((0, 5), (5, 6), (6, 11)):
        out = run(layers, config, tokens[:, start:stop], cache=cache)
        cache, _ = out.cache, pieces.append(out.hidden_BTD)
    assert int(cache.length) == 11
    assert_close(jnp.concatenate(pieces, 1), full)


def test_left_padding_changes_nothing(model):
    config, params = model
    tokens = tokens_of((1, 7))
    alone = run(params, config, tokens).hidden_BTD
    padded = jnp.concatenate([tokens_of((1, 4), 9), tokens], axis=1)
    both = jnp.concatenate([padded, tokens_of((1, 11), 3)])
    cache = init_cache(config, jnp.asarray([4, 0]), 11)
    out = run(params, config, both, cache=cache)
    assert_close(out.hidden_BTD[:1, 4:], alone)


def test_packed_segments_equal_single_rows(model):
    config, params = model
    first, second = tokens_of((1, 5), 4), tokens_of((1, 6), 5)
    packed = jnp.concatenate([first, second, jnp.zeros((1, 2), jnp.int32)], axis=1)
    segments = jnp.asarray([[1] * 5 + [2] * 6 + [0] * 2])
    positions = jnp.asarray([[*range(5), *range(6), 0, 0]])
    out = run(params, config, packed, positions_BT=positions, segment_ids_BT=segments)
    assert_close(out.hidden_BTD[:, :5], run(params, config, first).hidden_BTD)
    assert_close(out.hidden_BTD[:, 5:11], run(params, config, second).hidden_BTD)


def test_later_tokens_never_move_an_earlier_state(model):
    config, params = model
    tokens = tokens_of((1, 9))
    changed = tokens.at[0, 6:].set((tokens[0, 6:] + 1) % TINY.vocab_size)
    a, b = run(params, config, tokens).hidden_BTD, run(params, config, changed).hidden_BTD
    assert_close(a[:, :6], b[:, :6])
    assert float(jnp.max(jnp.abs(a[:, 6:] - b[:, 6:]))) > 1e-3


@pytest.mark.parametrize("remat", ["full", "dots", pytest.param("offload", marks=pytest.mark.slow)])
def test_remat_changes_no_gradient(model, remat):
    config, params = model

    def loss(p, options):
        return jnp.sum(tf.logits(p, config, tokens_of((1, 6)), options=options) ** 2)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    plain, again = (grad(params, tf.ForwardOptions(remat=kind)) for kind in ("none", remat))
    for path, expected in tree.flatten(plain).items():
        if float(jnp.max(jnp.abs(expected))) > 0:
            gap = jnp.max(jnp.abs(tree.flatten(again)[path] - expected))
            assert gap <= 3e-5 * jnp.max(jnp.abs(expected)), path


def test_linen_shell_has_the_same_tree_and_output(model):
    config, params = model
    shell = linen.Transformer(config)
    made = shell.init(jax.random.key(0), tokens_of((1, 3)))["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    out = shell.apply({"params": params}, tokens_of((1, 3)))
    assert_close(out.hidden_BTD, run(params, config, tokens_of((1, 3))).hidden_BTD)


def test_abstract_params_are_what_init_makes(model):
    config, _ = model
    made = tf.init_params(config, jax.random.key(0), "bfloat16")
    assert tree.abstract(made) == tf.abstract_params(config, "bfloat16")


def test_dynamic_rope_is_fixed_per_row_in_a_cache():
    rope = RopeConfig(1e4, "dynamic", 4.0, original_max_position=6)
    config = dataclasses.replace(TINY, rope=rope, initializer_range=0.3)
    params = tf.init_params(config, jax.random.key(0))
    tokens = tokens_of((2, 12))
    full = run(params, config, tokens).hidden_BTD
    # The row's final length is known beforehand, so every token is turned as in the full text.
    cache = init_cache(config, jnp.zeros(2, jnp.int32), 20, rope_length_B=jnp.full((2,), 12))
    first = run(params, config, tokens[:, :4], cache=cache)
    second = run(params, config, tokens[:, 4:], cache=first.cache)
    assert_close(jnp.concatenate([first.hidden_BTD, second.hidden_BTD], 1), full)


def test_bfloat16_is_near_float32(model):
    config, params = model
    exact = run(params, config, tokens_of((2, 8))).hidden_BTD
    options = tf.ForwardOptions(compute_dtype="bfloat16")
    near = run(params, config, tokens_of((2, 8)), options=options).hidden_BTD
    assert near.dtype == jnp.bfloat16
    if config.moe is None:  # a router may choose another expert for a rounded token
        assert float(jnp.mean(jnp.abs(near - exact)) / jnp.mean(jnp.abs(exact))) < 0.05


@pytest.mark.parametrize(
    "change,message",
    [
        ({"num_kv_heads": 3}, "4 heads cannot share 3"),
        ({"head_size": 7}, "must be even"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"activation": "selu"}, "silu, gelu"),
        ({"num_dense_layers": 1}, "got 1 of 2 layers of a model without experts"),
        ({"num_dense_layers": 2, "moe": MoEConfig(4, 3)}, "got 2 of 2 layers"),
        ({"gated": False, "moe": MoEConfig(4, 3)}, "experts are gated"),
    ],
)
def test_configs_that_cannot_work_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **change)


def test_layers_of_one_shape_are_one_run_whatever_their_windows():
    runs = CONFIGS["dense-first-moe"].runs
    shapes = [(run.name, run.num_layers, run.kind) for run in runs]
    assert shapes == [("0", 1, "dense"), ("1", 2, "moe")]
    assert [run.windows for run in runs] == [(0,), (3, 0)]
    (run,) = CONFIGS["windows-caps-sandwich"].runs
    assert run.windows == (3, 0, 3)


@pytest.mark.parametrize(
    "name", ["windows-caps-sandwich", pytest.param("learned-post-plain", marks=pytest.mark.slow)]
)
def test_attention_in_blocks_changes_nothing(name):
    config = dataclasses.replace(CONFIGS[name], initializer_range=0.3)
    params = tf.init_params(config, jax.random.key(0))
    tokens = tokens_of((2, 21))

    @functools.partial(jax.jit, static_argnums=1)
    def both(params, options):
        def loss(p):
            hidden = tf.forward(p, config, tokens, options=options).hidden_BTD
            return jnp.sum(jnp.sin(hidden)), hidden

        return jax.grad(loss, has_aux=True)(params)

    dense_grad, dense = both(params, tf.ForwardOptions(attention="dense"))
    blocks = tf.ForwardOptions(attention="blockwise", remat="dots")
    grad, found = both(params, blocks)
    assert_close(found, dense)
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(dense_grad))
    for ours, theirs in zip(*map(jax.tree.leaves, (grad, dense_grad)), strict=True):
        assert float(jnp.max(jnp.abs(ours - theirs))) <= TOLERANCE["float32"] * largest


def test_a_text_longer_than_the_learned_positions_is_refused():
    config = CONFIGS["learned-post-plain"]
    params = tf.abstract_params(config)
    tokens = jax.ShapeDtypeStruct((1, 65), jnp.int32)
    with pytest.raises(InputError, match="65 tokens, but the model has learned 64 positions"):
        jax.eval_shape(lambda p, t: tf.logits(p, config, t), params, tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_json_round_trip(name):
    config = CONFIGS[name]
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(InputError, match="num_wings"):
        ModelConfig.from_json(config.to_json() | {"num_wings": 2})
