"""Who goes where, and with what weight, against loops in numpy; what perturbs it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.moe.routing import abstract_router, init_router
from moejax.moe.routing import route as plain_route
from moejax.moe.scores import gate_logits
from moejax.moe.selection import tokens_per_expert, update_selection_bias
from tests.draws import normal, router_params

D, E, K = 6, 8, 3
route = jax.jit(plain_route, static_argnames=("config", "num_sequences"))


def like(name: str, **fields: Any) -> MoEConfig:
    return MoEConfig(E, K, **(CONVENTIONS[name] | fields))


def random_case(config, num_tokens=40):
    return router_params(D, config), normal((num_tokens, D), seed=20)


def float64_scores(config, router, x):
    z = np.asarray(gate_logits(router, x, config), np.float64)
    if config.score == "sigmoid":
        return 1 / (1 + np.exp(-z))
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


TOP_K = {
    "renormalized": like("mixtral"),
    "scores": like("olmoe"),
    "max_of_groups": like("deepseek_v2", num_groups=4, top_groups=2, scale=16.0),
    "sigmoid": like("deepseek_v3", selection_bias=False),
    "sigmoid_bias": like("deepseek_v3", scale=2.5),
    "softmax_bias": like("olmoe", selection_bias=True),
    "sigmoid_selected": like("deepseek_v3", weighting="selected"),
    "top2_sum_of_groups": like("deepseek_v3", num_groups=4, top_groups=2),
    "every_group": like("deepseek_v3", num_groups=2, top_groups=2, weighting="scores"),
}


@pytest.mark.parametrize("config", TOP_K.values(), ids=TOP_K)
def test_choices_and_weights_are_those_of_the_formulas(config):
    router, x = random_case(config)
    routing = route(router, x, config)
    s = float64_scores(config, router, x)
    z = np.asarray(gate_logits(router, x, config), np.float64)
    value = s + np.asarray(router.get("b_select", np.zeros(E)))
    size = E // config.num_groups
    for n in range(len(x)):
        groups = value[n].reshape(config.num_groups, size)
        best = np.sort(groups, axis=1)[:, ::-1]
        worth = best[:, 0] if config.group_score == "max" else best[:, :2].sum(1)
        allowed = np.argsort(-worth)[: config.top_groups]
        inside = [e for e in range(E) if e // size in allowed]
        wanted = sorted(inside, key=lambda e: -value[n, e])[:K]
        np.testing.assert_array_equal(routing.experts_NK[n], wanted)
        weights = s[n, wanted]
        if config.weighting == "renormalized":
            weights = weights / weights.sum()
        elif config.weighting == "selected":
            weights = np.exp(z[n, wanted]) / np.exp(z[n, wanted]).sum()
        np.testing.assert_allclose(routing.weights_NK[n], config.scale * weights, rtol=2e-5)
    if config.has_unit_weights:
        np.testing.assert_allclose(routing.weights_NK.sum(1), 1, rtol=2e-6)
    assert routing.dropped == 0 and routing.shared_weight_N is None


def test_groups_of_one_expert_and_all_groups_limit_nothing():
    base = like("deepseek_v2")
    router, x = random_case(base)
    for fields in ({"num_groups": 4, "top_groups": 4}, {"num_groups": 8, "top_groups": 3}):
        limited = route(router, x, dataclasses.replace(base, **fields))
        np.testing.assert_array_equal(limited.experts_NK, route(router, x, base).experts_NK)


def test_the_selection_bias_enters_the_choice_and_no_weight():
    config = like("deepseek_v3", weighting="scores", z_weight=0.1)
    router, x = random_case(config)
    router["b_select"] = jnp.zeros(E).at[5].set(10.0)
    routing = route(router, x, config)
    assert (routing.experts_NK[:, 0] == 5).all()
    np.testing.assert_allclose(
        routing.weights_NK[:, 0], float64_scores(config, router, x)[:, 5], rtol=1e-5
    )
    even = route(router | {"b_select": jnp.full(E, 7.0)}, x, config)
    none = route(router | {"b_select": jnp.zeros(E)}, x, config)
    assert (jnp.sort(even.experts_NK) == jnp.sort(none.experts_NK)).mean() > 0.99

    def loss(router):
        routing = plain_route(router, x, config)
        return routing.weights_NK.sum() + routing.balance_loss + routing.z_loss

    gradient = jax.jit(jax.grad(loss))(router)
    assert (gradient["b_select"] == 0).all() and (gradient["w_out"] != 0).any()


def test_the_bias_rule_makes_a_skewed_load_even():
    """A router that sends nearly all to two experts; 400 steps at rate 0.01."""
    config = like("deepseek_v3", bias_rate=0.01)
    router, x = random_case(config, 256)
    router["w_out"] = 0.3 * router["w_out"]
    x = x.at[:, 0].set(1.0)
    router["w_out"] = router["w_out"].at[0].add(jnp.array([3.0, 2.0] + [0.0] * 6))

    @jax.jit
    def run(bias):
        def step(bias, _):
            counts = plain_route(router | {"b_select": bias}, x, config).counts_E
            return update_selection_bias(bias, counts, config.bias_rate), counts

        return jax.lax.scan(step, bias, None, 400)

    _, counts = run(jnp.zeros(E))
    first, last = np.asarray(counts[0]), np.asarray(counts[-20:]).mean(0)
    mean = 256 * K / E
    assert first.max() > 2.5 * mean and last.max() < 1.1 * mean and last.min() > 0.9 * mean
    assert (counts.sum(1) == 256 * K).all()


def test_the_bias_rule_is_a_sign_and_keeps_layers_apart():
    counts = jnp.array([[4.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    moved = update_selection_bias(jnp.zeros((2, 4)), counts, 0.001)
    np.testing.assert_allclose(moved, [[-0.001, 0.001, 0, 0], [0, 0, 0, 0]])


def test_a_fresh_selection_bias_is_float32_whatever_the_model_is():
    config = like("deepseek_v3")
    router = init_router(jax.random.key(0), D, config, jnp.bfloat16)
    assert {name: leaf.shape for name, leaf in router.items()} == abstract_router(D, config)
    assert router["b_select"].dtype == jnp.float32 and router["w_out"].dtype == jnp.bfloat16
    assert (router["b_select"] == 0).all()


@pytest.mark.parametrize(("factor", "per_expert"), [(1.0, 8), (0.3, 3), (9.0, 20)])
def test_each_expert_takes_its_best_tokens_of_each_row(factor, per_expert):
    config = like("expert_choice", capacity_factor=factor)
    assert tokens_per_expert(20, config) == per_expert
    router, x = random_case(config)
    routing = route(router, x, config, num_sequences=2)
    s = float64_scores(config, router, x)
    got = np.zeros((40, E))
    np.add.at(got, (routing.token_N, routing.experts_NK[:, 0]), routing.weights_NK[:, 0])
    wanted = np.zeros((40, E))
    for row in range(2):
        for expert in range(E):
            tokens = 20 * row + np.argsort(-s[20 * row : 20 * (row + 1), expert])[:per_expert]
            wanted[tokens, expert] = s[tokens, expert]
    np.testing.assert_allclose(got, wanted, rtol=2e-5)
    np.testing.assert_allclose(routing.dense_weights(40, E), wanted, rtol=2e-5)
    np.testing.assert_array_equal(routing.counts_E, np.full(E, 2 * per_expert))
    np.testing.assert_allclose(routing.dropped, (wanted.sum(1) == 0).mean(), rtol=1e-6)
    assert (routing.dropped > 0) == (factor < 1)


def test_rows_do_not_compete_for_experts_and_padding_is_taken_last():
    config = like("expert_choice")
    router, x = random_case(config)
    both = route(router, x, config, num_sequences=2)
    alone = route(router, x[20:], config, num_sequences=1)
    np.testing.assert_allclose(
        both.dense_weights(40, E)[20:], alone.dense_weights(20, E), rtol=1e-5, atol=1e-7
    )
    mask = jnp.arange(40) % 20 < 5
    routing = route(router, x, config, mask_N=mask, num_sequences=2)
    weights = routing.dense_weights(40, E)
    assert (weights[~mask] == 0).all() and (weights[mask] > 0).all()
    assert (routing.counts_E == 10).all() and routing.dropped == 0


def test_expert_choice_sees_the_future():
    """The warning of its docstring is true: a later token takes an earlier one's expert away."""
    config = like("expert_choice")
    router, x = random_case(config, 20)
    moved = route(router, x.at[10:].multiply(3.0), config)
    wanted = route(router, x, config)
    early = slice(0, 10)
    assert (moved.dense_weights(20, E)[early] != wanted.dense_weights(20, E)[early]).any()


def test_jitter_scales_the_router_s_input_and_only_in_training():
    config = like("olmoe", jitter=0.2)
    router = {"w_out": 4.0 * jnp.eye(E)}
    x = jnp.eye(E)  # logit e of token e is 4 u, the rest 0
    quiet, plain = route(router, x, config), route(router, x, dataclasses.replace(config, jitter=0))
    np.testing.assert_array_equal(quiet.weights_NK, plain.weights_NK)
    shaken = route(router, x, config, rng=jax.random.key(0))
    first = np.asarray(shaken.weights_NK[:, 0], np.float64)
    u = np.log(first * (E - 1) / (1 - first)) / 4
    assert (u > 0.8 - 1e-4).all() and (u < 1.2 + 1e-4).all() and u.min() < 0.95 and u.max() > 1.05


def test_a_soft_cap_bounds_large_logits_and_leaves_small_ones():
    config = like("mixtral", soft_cap=3.0)
    router, x = random_case(config)
    z = gate_logits(router, 100 * x, config)
    assert np.abs(z).max() <= 3 and np.abs(z).mean() > 2.5
    plain = gate_logits(router, x, like("mixtral"))
    np.testing.assert_allclose(gate_logits(router, x, config), 3 * np.tanh(plain / 3), rtol=1e-5)
    small = gate_logits(router, 1e-3 * x, config)
    np.testing.assert_allclose(small, 1e-3 * plain, rtol=1e-4, atol=1e-8)


@functools.partial(jax.jit, static_argnums=1)
def equal_logits(x, config):
    return plain_route({"w_out": jnp.zeros((D, E))}, x, config)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3"])
def test_equal_logits_give_equal_weights_and_the_first_experts(name):
    config = like(name, selection_bias=False)
    routing = equal_logits(normal((5, D)), config)
    np.testing.assert_array_equal(routing.experts_NK, np.tile(np.arange(K), (5, 1)))
    wanted = 1 / E if config.weighting == "scores" else 1 / K
    np.testing.assert_allclose(routing.weights_NK, wanted, rtol=1e-6)
