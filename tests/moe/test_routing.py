"""The router against its definition: weights, noise, balance losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.config import MoEConfig
from moejax.moe.losses import cv_squared
from moejax.moe.routing import abstract_router, init_router
from moejax.moe.routing import route as plain_route
from moejax.moe.scores import gate_logits
from tests.draws import normal, router_params

D = 6
route = jax.jit(plain_route, static_argnames="config")


def fixed_router(logits):
    """A linear router and the one-hot tokens that make its logits the rows given."""
    logits = jnp.asarray(logits, jnp.float32)
    return {"w_out": logits, "w_noise": jnp.zeros_like(logits)}, jnp.eye(logits.shape[0])


def random_case(config, num_tokens=64):
    return router_params(D, config), normal((num_tokens, D), seed=20)


def config_of(weighting, **fields):
    num_shared = 0 if weighting == "selected" else 1
    return MoEConfig(
        **{"num_experts": 8, "top_k": 6, "num_shared": num_shared} | fields, weighting=weighting
    )


def test_the_worked_example_of_the_paper_s_weights():
    config = config_of("normalized", gate="linear")
    routing = route(*fixed_router([[4, 2, 1, 0, 0, -1, -1]]), config)
    np.testing.assert_array_equal(routing.experts_NK[0], [1, 2, 3, 4, 5])
    np.testing.assert_allclose(
        routing.weights_NK[0], [0.283, 0.140, 0.131, 0.128, 0.128], atol=6e-4
    )
    np.testing.assert_allclose(routing.shared_weight_N, [0.190], atol=6e-4)


def test_an_even_router_leaves_the_shared_expert_six_sevenths():
    routing = route(*fixed_router(np.zeros((3, 7))), config_of("normalized", gate="linear"))
    np.testing.assert_allclose(routing.shared_weight_N, 6 / 7, rtol=1e-6)
    np.testing.assert_allclose(routing.weights_NK, 1 / 35, rtol=1e-6)


@pytest.mark.parametrize("gate", ["mlp", "linear"])
@pytest.mark.parametrize("weighting", ["normalized", "unnormalized", "selected"])
def test_weights_are_those_of_the_formulas(weighting, gate):
    config = config_of(weighting, gate=gate)
    router, x = random_case(config)
    routing = route(router, x, config)
    z = np.asarray(gate_logits(router, x, config), np.float64)
    s = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    for n in range(len(x)):
        chosen = np.asarray(routing.experts_NK[n]) - config.num_shared
        assert set(chosen) == set(np.argsort(-z[n])[: config.routed_per_token])
        p = s[n, chosen]
        wanted = {
            "normalized": s[n].max() * np.exp(p) / np.exp(p).sum(),
            "unnormalized": p,
            "selected": p / p.sum(),
        }[weighting]
        np.testing.assert_allclose(routing.weights_NK[n], wanted, rtol=2e-5)
        if config.num_shared:
            np.testing.assert_allclose(routing.shared_weight_N[n], 1 - s[n].max(), atol=2e-6)
    total = routing.weights_NK.sum(1) + (routing.shared_weight_N if config.num_shared else 0)
    if config.has_unit_weights:
        np.testing.assert_allclose(total, 1, rtol=2e-6)
    else:
        assert (total >= 1 - 1e-6).all() and total.max() > 1.01


def test_the_mlp_gate_is_two_matrices_with_a_tanh_between():
    config = config_of("normalized")
    router, x = random_case(config)
    x, w1, w2 = (np.asarray(a, np.float64) for a in (x, router["w_hidden"], router["w_out"]))
    wanted = np.tanh(x @ w1) @ w2
    np.testing.assert_allclose(
        gate_logits(router, jnp.asarray(x, jnp.float32), config),
        wanted,
        atol=1e-5 * np.abs(wanted).max(),
    )


def test_logits_are_float32_for_a_bfloat16_model():
    config = config_of("normalized")
    router, x = random_case(config)
    routing = route(router, x.astype(jnp.bfloat16), config)
    exact = route(router, x.astype(jnp.bfloat16).astype(jnp.float32), config)
    np.testing.assert_array_equal(routing.experts_NK, exact.experts_NK)
    np.testing.assert_array_equal(routing.weights_NK, exact.weights_NK)


def test_a_fresh_router_is_small_with_no_noise_matrix_values():
    config = config_of("normalized")
    router = init_router(jax.random.key(0), 512, config)
    assert {k: v.shape for k, v in router.items()} == abstract_router(512, config)
    np.testing.assert_array_equal(router["w_noise"], 0)
    assert abs(float(router["w_hidden"].std()) - 0.02) < 0.002


def test_noise_needs_a_key_and_follows_its_learned_scale():
    config = config_of("normalized", gate="linear", balance_weight=1.0)
    router, x = random_case(config)
    quiet = route(router, x, config)
    noisy = [route(router, x, config, rng=jax.random.key(i)) for i in (0, 0, 1)]
    assert (noisy[0].experts_NK == noisy[1].experts_NK).all()
    assert (noisy[0].experts_NK != noisy[2].experts_NK).any()
    assert (noisy[0].experts_NK != quiet.experts_NK).any()
    router["w_noise"] = -jnp.sign(x).mean() * 0 - 1e4 * jnp.ones_like(router["w_noise"])
    still = route(router, jnp.abs(x), config, rng=jax.random.key(0))
    wanted = route(router, jnp.abs(x), config)
    changed = (jnp.sort(still.experts_NK) != jnp.sort(wanted.experts_NK)).mean()
    assert changed < 0.05  # 0.01, the floor, is all that is left of the noise
    silent = config_of("normalized", gate="linear", noise=False)
    unmoved = route(router, x, silent, rng=jax.random.key(0))
    np.testing.assert_array_equal(unmoved.experts_NK, route(router, x, silent).experts_NK)


def test_noise_has_softplus_of_zero_plus_the_floor_at_the_start():
    config = config_of("normalized", gate="linear", num_experts=3, top_k=2)
    router, x = fixed_router(np.zeros((1, 2)))
    keys = jax.random.split(jax.random.key(0), 4000)
    first = jax.vmap(lambda k: route(router, x, config, rng=k).shared_weight_N[0])(keys)
    gap = np.log(1 / (1 - np.asarray(first)) - 1)  # -(|z1 - z2|), z apart by std * sqrt(2)
    std = np.sqrt((gap**2).mean() / 2)
    np.testing.assert_allclose(std, np.log(2) + 0.01, rtol=0.05)


def test_cv_squared_is_unbiased_variance_over_squared_mean():
    v = np.array([3.0, 1.0, 4.0, 1.0, 5.0])
    np.testing.assert_allclose(cv_squared(jnp.asarray(v)), v.var(ddof=1) / v.mean() ** 2, rtol=1e-6)
    assert cv_squared(jnp.ones(1)) == 0
    assert cv_squared(jnp.zeros(4)) == 0


@pytest.mark.parametrize("weighting", ["normalized", "selected"])
def test_balance_loss_without_noise_counts(weighting):
    config = config_of(weighting, balance_weight=0.5, gate="linear")
    router, x = random_case(config)
    routing = route(router, x, config)
    counts = np.bincount(np.asarray(routing.experts_NK).ravel(), minlength=8)
    np.testing.assert_array_equal(
        routing.counts_E[config.num_shared :], counts[config.num_shared :]
    )
    np.testing.assert_array_equal(routing.load_J, counts[config.num_shared :])
    z = gate_logits(router, x, config)
    probs = np.asarray(jax.nn.softmax(z) if weighting == "normalized" else jnp.exp(z))
    importance = np.zeros(config.num_routed)
    for n, row in enumerate(np.asarray(routing.experts_NK) - config.num_shared):
        scale = 1 if weighting == "normalized" else probs[n, row].sum()
        importance[row] += probs[n, row] / scale
    np.testing.assert_allclose(routing.importance_J, importance, rtol=1e-5)
    wanted = 0.5 * (cv_squared(jnp.asarray(importance)) + cv_squared(routing.load_J))
    np.testing.assert_allclose(routing.balance_loss, wanted, rtol=1e-4)


def test_the_load_is_the_chance_to_be_chosen_if_one_s_own_noise_is_drawn_again():
    config = config_of("normalized", gate="linear", num_experts=5, top_k=3)
    router, x = fixed_router([[0.4, 0.1, -0.2, 0.3]])
    key = jax.random.key(3)
    routing = route(router, x, config, rng=key)
    std = np.log(2) + 0.01
    clean = np.asarray(router["w_out"][0], np.float64)
    noisy = clean + np.asarray(jax.random.normal(jax.random.fold_in(key, 0), (4,))) * std
    draws = np.random.default_rng(0).normal(size=200_000) * std
    for i in range(4):
        others = np.sort(np.delete(noisy, i))[::-1]
        chance = (clean[i] + draws > others[config.routed_per_token - 1]).mean()
        np.testing.assert_allclose(routing.load_J[i], chance, atol=5e-3)


def test_the_reference_s_load_compares_the_noise_alone():
    logits = [[2.0, 1.0, -1.0, -2.0]]
    ours = config_of("normalized", gate="linear", num_experts=5, top_k=3)
    theirs = config_of(
        "normalized", gate="linear", num_experts=5, top_k=3, load_estimator="noise_term"
    )
    key, std = jax.random.key(1), np.log(2) + 0.01
    noise = np.asarray(jax.random.normal(jax.random.fold_in(key, 0), (4,))) * std
    noisy = np.sort(np.asarray(logits[0]) + noise)[::-1]
    threshold = np.where(noise > noisy[2], noisy[2], noisy[1])
    wanted = jax.scipy.stats.norm.cdf((np.asarray(logits[0]) - threshold) / std)
    got = route(*fixed_router(logits), theirs, rng=key)
    np.testing.assert_allclose(got.load_J, wanted, rtol=1e-4, atol=1e-6)
    assert not np.allclose(
        got.load_J, route(*fixed_router(logits), ours, rng=key).load_J, atol=0.01
    )


def test_padding_is_out_of_the_losses_unless_asked_for():
    config = config_of("normalized", gate="linear")
    router, x = random_case(config)
    mask = jnp.arange(64) < 40
    key = jax.random.key(0)
    short, masked = route(router, x[:40], config), route(router, x, config, mask_N=mask)
    np.testing.assert_array_equal(masked.counts_E, short.counts_E)
    np.testing.assert_allclose(masked.balance_loss, short.balance_loss, rtol=1e-5)
    assert masked.counts_E[0] == 40
    counting = config_of("normalized", gate="linear", count_padding=True)
    everything = route(router, x, counting, mask_N=mask, rng=key)
    np.testing.assert_allclose(
        everything.balance_loss, route(router, x, counting, rng=key).balance_loss
    )


def test_balance_loss_has_a_gradient_in_every_router_matrix():
    config = config_of("normalized")
    router, x = random_case(config)

    def loss(router):
        return route(router, x, config, rng=jax.random.key(0)).balance_loss

    for name, gradient in jax.grad(loss)(router).items():
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, name


def test_two_of_four_with_a_shared_expert_gives_the_one_routed_expert_s_max():
    config = config_of("normalized", num_experts=4, top_k=2)
    router, x = random_case(config)
    routing = route(router, x, config)
    np.testing.assert_allclose(routing.weights_NK[:, 0], 1 - routing.shared_weight_N, rtol=1e-6)
