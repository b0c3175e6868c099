"""Merging: untrained experts give the dense model back; coefficients alone have gradients."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods import merge as merging
from moejax.methods.merge import MergeConfig, init_coefficients, merge_experts, merged_params
from moejax.methods.upcycle import upcycle
from moejax.models.config import ModelConfig
from moejax.models.transformer import logits
from moejax.moe.config import MoEConfig
from tests.draws import model_params, moved, normal

DENSE = ModelConfig("llama", 31, 2, 16, 24, 2, 1, 8, mlp_bias=True)
SHARED = MoEConfig(4, 3)
PLAIN = MoEConfig(3, 2, num_shared=0, weighting="selected")
MERGES = {
    "fixed": MergeConfig(),
    "per_matrix": MergeConfig(per_matrix=True),
    "learned": MergeConfig(lam=0.6, learn_lambda=True, per_matrix=True),
}


def untrained(moe=SHARED):
    params = model_params(DENSE)
    return params, *upcycle(params, DENSE, moe, jax.random.key(1))


def trained(moe=SHARED):
    """A mixture whose experts have drifted apart."""
    _, params, config = untrained(moe)
    return moved(params, 2, 0.1), config


def drawn(config, merge):
    """Coefficients away from their start."""
    return moved(init_coefficients(config, merge), 3, 1.0)


def by_hand(stack, lam, c):
    """lam W_shared + (1 - lam) sum c_i W_i for one layer, in float64."""
    stack, c = np.asarray(stack, np.float64), np.asarray(c, np.float64)
    if lam is None:
        return np.tensordot(c, stack, 1)
    return lam * stack[0] + (1 - lam) * np.tensordot(c, stack[1:], 1)


def expected_mlp(params, config, coefficients, merge):
    leaves = coefficients["0"]
    c = np.asarray(jax.nn.softmax(leaves["alpha"], axis=-1))
    lam = np.full(config.num_layers, merge.lam)
    if merge.learn_lambda:
        lam = np.asarray(jax.nn.sigmoid(leaves["lam_logit"]))
    out = {}
    for name, stack in params["layers"]["0"]["moe"]["experts"].items():
        row = ("gate", "up", "down").index(name[2:])
        out[name] = np.stack(
            [
                by_hand(
                    stack[layer],
                    lam[layer] if config.moe.num_shared else None,
                    c[layer, row] if merge.per_matrix else c[layer],
                )
                for layer in range(config.num_layers)
            ]
        )
    return out


@pytest.mark.parametrize("moe", [SHARED, PLAIN], ids=["shared", "plain"])
def test_untrained_experts_give_the_dense_tree_back_bit_for_bit(moe):
    params, moe_params, config = untrained(moe)
    for merge in list(MERGES.values())[: 3 if moe.num_shared else 2]:
        coefficients = drawn(config, merge)
        merged, merged_config = merge_experts(moe_params, config, coefficients, merge)
        assert merged_config == DENSE
        assert tree.diff(merged, params) == []


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_mixes_by_the_formula(merge):
    params, config = trained()
    coefficients = drawn(config, merge)
    merged, _ = merge_experts(params, config, coefficients, merge)
    for name, wanted in expected_mlp(params, config, coefficients, merge).items():
        got = merged["layers"]["0"]["mlp"][name]
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


def test_without_a_shared_expert_it_is_the_convex_combination():
    params, config = trained(PLAIN)
    coefficients = drawn(config, MergeConfig())
    merged, _ = merge_experts(params, config, coefficients, MergeConfig())
    for name, wanted in expected_mlp(params, config, coefficients, MergeConfig()).items():
        got = merged["layers"]["0"]["mlp"][name]
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


def test_all_else_is_carried_and_the_router_is_gone():
    params, config = trained()
    merged, _ = merging.uniform(params, config)
    carried = [path for path in tree.flatten(params) if "/moe/" not in path]
    flat = tree.flatten(merged)
    assert set(flat) == {
        *carried,
        *(f"layers/0/mlp/{m}_{n}" for m in "wb" for n in merging.MATRICES),
    }
    for path in carried:
        np.testing.assert_array_equal(flat[path], tree.flatten(params)[path])


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_gradients_are_those_of_plain_autodiff(merge):
    params, config = trained()
    coefficients = drawn(config, merge)
    weights = {
        name: normal(w[:, 0].shape, seed=5)
        for name, w in params["layers"]["0"]["moe"]["experts"].items()
    }

    def ours(coefficients):
        mlp = merged_params(params, config, coefficients, merge)["layers"]["0"]["mlp"]
        return sum(jnp.sum(weights[name] * w) for name, w in mlp.items())

    def plain(coefficients):
        leaves, total = coefficients["0"], 0.0
        lam = merge.lam
        if merge.learn_lambda:
            lam = jax.nn.sigmoid(leaves["lam_logit"])[:, None]
        c = (1 - lam) * jax.nn.softmax(leaves["alpha"], -1).reshape(config.num_layers, -1)
        c = c.reshape(leaves["alpha"].shape)
        for name, w in params["layers"]["0"]["moe"]["experts"].items():
            row = c[:, merging.MATRICES.index(name[2:])] if merge.per_matrix else c
            moved = jnp.einsum("le,le...->l...", row, w[:, 1:] - w[:, :1])
            total = total + jnp.sum(weights[name] * (w[:, 0] + moved))
        return total

    got, wanted = jax.jit(jax.grad(ours))(coefficients), jax.jit(jax.grad(plain))(coefficients)
    for path, leaf in tree.flatten(got).items():
        other = tree.flatten(wanted)[path]
        np.testing.assert_allclose(leaf, other, atol=1e-5 * np.abs(other).max())


def test_neither_way_copies_the_experts():
    stack = jax.ShapeDtypeStruct((4, 8, 128, 256), jnp.float32)
    weights = jax.ShapeDtypeStruct((4, 8), jnp.float32)

    def gradient(weights, stack, d_mixed):
        return jax.vjp(lambda w: merging.mix_experts(stack, w), weights)[1](d_mixed)

    d_mixed = jax.ShapeDtypeStruct((4, 128, 256), jnp.float32)
    one_matrix = 128 * 256 * 4
    for fn, args in (
        (merging.mix_experts, (stack, weights)),
        (gradient, (weights, stack, d_mixed)),
    ):
        temp = jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes
        assert temp < 4 * one_matrix, fn  # all experts would be 32 of them


def test_the_loss_trains_the_coefficients_alone():
    params, config = trained()
    merge = MergeConfig()

    def dense_loss(dense_params, dense_config, batch, rng):
        assert dense_config == DENSE
        picked = jax.nn.log_softmax(logits(dense_params, dense_config, batch))[..., 0]
        return -picked.mean(), {"tokens": jnp.asarray(batch.size)}

    loss = merging.merge_loss(config, merge, dense_loss)
    batch = np.arange(12).reshape(2, 6) % 31
    start = init_coefficients(config, merge)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradient = step(start, params, batch, jax.random.key(0))
    assert metrics["tokens"] == 12
    assert jax.tree.structure(gradient) == jax.tree.structure(start)
    downhill = jax.tree.map(lambda a, g: a - g / jnp.abs(g).max(), start, gradient)
    assert step(downhill, params, batch, jax.random.key(0))[0][0] < value


def test_uniform_is_the_start_of_learning_and_the_grid_holds_it():
    params, config = trained()
    start, _ = merge_experts(
        params, config, init_coefficients(config, MergeConfig()), MergeConfig()
    )
    uniform, _ = merging.uniform(params, config)
    assert tree.diff(start, uniform) == []
    grid = dict(merging.lambda_grid(params, config, [0.5, 0.75, 1.0]))
    assert tree.diff(grid[0.75], uniform) == []
    only, only_config = merging.shared_only(params, config)
    assert only_config == DENSE
    assert tree.diff(grid[1.0], only) == []
    wanted = params["layers"]["0"]["moe"]["experts"]["w_up"][:, 0]
    np.testing.assert_array_equal(only["layers"]["0"]["mlp"]["w_up"], wanted)


def test_learning_lambda_starts_at_lam_and_warns(caplog):
    params, config = trained()
    with caplog.at_level(logging.WARNING):
        coefficients = init_coefficients(config, MergeConfig(lam=0.6, learn_lambda=True))
    assert "collapse" in caplog.text
    found = merging.describe(config, coefficients, MergeConfig(lam=0.6, learn_lambda=True))
    np.testing.assert_allclose(found["0"]["lam"], [0.6, 0.6], rtol=1e-6)
    assert found["0"]["max_relative_departure"] < 1e-6
    learned, _ = merge_experts(
        params, config, coefficients, MergeConfig(lam=0.6, learn_lambda=True)
    )
    fixed, _ = merging.uniform(params, config, 0.6)
    for a, b in zip(jax.tree.leaves(learned), jax.tree.leaves(fixed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: MergeConfig(lam=1.5), "lam=1.5"),
        (lambda: MergeConfig(lam=1.0, learn_lambda=True), "lam=1.0"),
        (lambda: merging.dense_config(DENSE), "no experts"),
        (lambda: init_coefficients(plain_config(), MergeConfig(learn_lambda=True)), "num_shared=0"),
        (lambda: merging.shared_only({}, plain_config()), "num_shared=0"),
        (lambda: merging.dense_config(plain_config(expert_ffn=5)), "expert_ffn=5"),
        (lambda: merging.dense_config(plain_config(shared_ffn=7)), "shared_ffn=7"),
    ],
)
def test_bad_input_is_named(act, words):
    with pytest.raises(InputError, match=words):
        act()


def plain_config(**fields):
    return dataclasses.replace(DENSE, moe=dataclasses.replace(PLAIN, **fields))
