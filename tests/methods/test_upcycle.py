"""Upcycling changes nothing at step 0, for every weighting that sums to one and any rope."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.precision import TOLERANCE
from moejax.methods.upcycle import upcycle
from moejax.models.config import ModelConfig
from moejax.models.transformer import abstract_params, logits
from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.ops.rope import RopeConfig
from tests.draws import model_params

TINY = ModelConfig("llama", 61, 3, 16, 24, 4, 2, 8)
ROPES = {
    "theta": RopeConfig(theta=5e5),
    "linear": RopeConfig(theta=1e5, kind="linear", factor=4.0),
    "dynamic": RopeConfig(kind="dynamic", factor=2.0, original_max_position=8),
    "llama3": RopeConfig(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=16,
    ),
}
MOES = {
    "normalized": MoEConfig(4, 3),
    "linear": MoEConfig(8, 6, gate="linear", noise=False),
    "selected": MoEConfig(4, 2, num_shared=0, weighting="selected"),
    "mixtral": MoEConfig(4, 2, **CONVENTIONS["mixtral"]),
    "sigmoid": MoEConfig(4, 2, **CONVENTIONS["deepseek_v3"]),
}
UNNORMALIZED = MoEConfig(4, 3, weighting="unnormalized")
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 13))


def dense(**fields):
    config = dataclasses.replace(TINY, **fields)
    return model_params(config), config


def biased():
    """Every option of the family on; the biases are not zero."""
    return dense(mlp_bias=True, attention_bias=True, tie_embeddings=True)


def gap(params, config, moe):
    compiled = jax.jit(logits, static_argnums=1)
    wanted = compiled(params, config, TOKENS)
    got = compiled(*upcycle(params, config, moe, jax.random.key(2)), TOKENS)
    return float(jnp.abs(got - wanted).max() / jnp.abs(wanted).max())


@pytest.mark.parametrize("moe", MOES.values(), ids=MOES)
def test_step_0_has_the_dense_model_s_logits(moe):
    assert gap(*biased(), moe) < TOLERANCE["float32"]


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_whatever_the_rope(rope):
    params, config = dense(rope=rope)
    assert gap(params, config, MOES["normalized"]) < TOLERANCE["float32"]
    _, upcycled = upcycle(params, config, MOES["normalized"], jax.random.key(2))
    assert upcycled.rope == rope


def test_weights_that_do_not_sum_to_one_change_the_logits():
    assert gap(*dense(), UNNORMALIZED) > 1e-3


def test_the_tree_is_the_one_a_config_asks_for():
    params, config = biased()
    for moe in MOES.values():
        moe_params, moe_config = upcycle(params, config, moe, jax.random.key(0))
        shapes = {path: leaf.shape for path, leaf in tree.flatten(moe_params).items()}
        wanted = tree.flatten(abstract_params(moe_config))
        assert shapes == {path: leaf.shape for path, leaf in wanted.items()}
        assert dataclasses.replace(moe_config, moe=None) == config


def test_every_expert_is_the_dense_layer_bit_for_bit():
    params, config = biased()
    moe_params, _ = upcycle(params, config, MOES["normalized"], jax.random.key(0))
    for name, w in params["layers"]["0"]["mlp"].items():
        stack = moe_params["layers"]["0"]["moe"]["experts"][name]
        for e in range(4):
            np.testing.assert_array_equal(stack[:, e], w)
    router = moe_params["layers"]["0"]["moe"]["router"]
    assert (router["w_hidden"][0] != router["w_hidden"][1]).any()  # each layer draws its own
    np.testing.assert_array_equal(router["w_noise"], 0)


def test_the_key_alone_decides_the_router_and_the_source_is_left_alone():
    params, config = dense()
    before = jax.tree.map(np.array, params)
    first, again, other = (
        upcycle(params, config, MOES["linear"], jax.random.key(k))[0] for k in (0, 0, 1)
    )
    assert tree.diff(first, again) == [] and len(tree.diff(first, other)) == 1
    assert tree.diff(before, params) == []


def test_numpy_parameters_in_bfloat16():
    params, config = dense()
    host = jax.tree.map(lambda w: np.asarray(w.astype("bfloat16")), params)
    moe_params, _ = upcycle(host, config, MOES["normalized"], jax.random.key(0))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(moe_params)} == {"bfloat16"}


def test_a_model_with_experts_is_refused():
    moe_params, config = upcycle(*dense(), MOES["normalized"], jax.random.key(0))
    with pytest.raises(InputError, match="already has 4 experts"):
        upcycle(moe_params, config, MOES["normalized"], jax.random.key(0))


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"expert_ffn": 12}, "expert_ffn=12.*width 24"), ({"shared_ffn": 8}, "shared_ffn=8")],
)
def test_what_a_dense_model_has_no_weights_for_is_refused(fields, words):
    moe = dataclasses.replace(MOES["mixtral"], **fields)
    with pytest.raises(InputError, match=words):
        upcycle({}, TINY, moe, jax.random.key(0))
