"""Products whose sums stay float32: values, gradients, and what the backward pass multiplies."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions
from moejax.ops.wide_product import wide_product
from moejax.train.loss import lm_loss


def draw(*shape, seed=0, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def test_the_result_is_not_rounded_and_the_gradients_are_those_of_a_rounded_one():
    x, w, d_out = draw(3, 5, 16), draw(16, 7, seed=1), draw(3, 5, 7, seed=2, dtype="float32")
    out, pull = jax.vjp(functools.partial(wide_product, jnp.matmul), x, w)
    assert out.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(out, exact, atol=1e-5)
    _, plain = jax.vjp(jnp.matmul, x, w)
    for got, wanted in zip(pull(d_out), plain(d_out.astype("bfloat16")), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32")])
def test_other_operands_have_jaxs_own_gradient(dtypes):
    x, w = draw(3, 16, dtype=dtypes[0]), draw(16, 7, seed=1, dtype=dtypes[1])

    def loss(product, x, w):
        return jnp.sum(product(x, w) ** 2)

    ours = functools.partial(wide_product, jnp.matmul)
    plain = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    for got, wanted in zip(*(jax.grad(loss, (1, 2))(p, x, w) for p in (ours, plain)), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_remat_that_keeps_products_keeps_these():
    x, w = draw(3, 16), draw(16, 7, seed=1)

    def loss(x, w):
        return jnp.sum(jnp.sin(wide_product(jnp.matmul, x, w)))

    def num_products(policy):
        remat = jax.checkpoint(loss, policy=policy)
        traced = jax.make_jaxpr(jax.grad(remat, (0, 1)))(x, w)
        return len(list(_products(traced.jaxpr)))

    assert num_products(jax.checkpoint_policies.dots_saveable) == 3
    assert num_products(jax.checkpoint_policies.nothing_saveable) == 4


def test_more_operands_pass_through():
    x, w, sizes = draw(6, 16), draw(2, 16, 7, seed=1), jnp.asarray([4, 2])
    out, pull = jax.vjp(lambda x, w: wide_product(jax.lax.ragged_dot, x, w, sizes), x, w)
    assert out.dtype == jnp.float32
    assert [d.shape for d in pull(out)] == [x.shape, w.shape]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", ["dense", "blockwise"])
def test_training_in_bfloat16_multiplies_no_float32(tied, attention):
    config = ModelConfig("llama", 64, 2, 16, 24, 4, 2, 8, max_position=64, tie_embeddings=tied)
    params = transformer.abstract_params(config)
    options = ForwardOptions("bfloat16", attention=attention)
    batch = {"tokens": jnp.zeros((2, 8), jnp.int32), "segment_ids": jnp.ones((2, 8), jnp.int32)}
    batch |= {"positions": jnp.zeros((2, 8), jnp.int32), "loss_mask": jnp.ones((2, 8))}
    traced = jax.make_jaxpr(jax.grad(lambda p: lm_loss(p, config, batch, None, options)[0]))(params)
    products = list(_products(traced.jaxpr))
    assert len(products) > 20
    assert {str(v.aval.dtype) for product in products for v in product.invars} == {"bfloat16"}


def _products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _products(inner)
