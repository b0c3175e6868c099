"""Balance losses and the z-loss: their values, what moves them, padding, and the mesh.

A mesh axis is stood in for by `jax.vmap` with an axis name: psum and pmean mean the same there.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.moe.losses import switch_balance
from moejax.moe.routing import route
from moejax.moe.scores import gate_logits
from tests.draws import normal, router_params

D, E, K, ROWS, LENGTH = 6, 8, 2, 4, 10
MASK_BT = np.arange(LENGTH) < np.array([[10], [6], [0], [3]])


def config_of(balance: str, **fields: Any) -> MoEConfig:
    base: dict[str, Any] = CONVENTIONS["olmoe"] | {"balance_weight": 1.0, "z_weight": 1.0}
    return MoEConfig(E, K, **(base | fields | {"balance": balance}))


def tokens(seed=20):
    return normal((ROWS * LENGTH, D), seed)


@functools.partial(jax.jit, static_argnums=2)
def statistics(router, x, config, mask=None, rng=None):
    routing = route(router, x, config, mask_N=mask, rng=rng, num_sequences=ROWS)
    return {
        "balance": routing.balance_loss,
        "z": routing.z_loss,
        "counts": routing.counts_E,
        "dropped": routing.dropped,
        "shared": routing.shared_weight,
    }


def probabilities(router, x, config):
    z = np.asarray(gate_logits(router, x, config), np.float64)
    s = 1 / (1 + np.exp(-z)) if config.score == "sigmoid" else np.exp(z)
    return s / s.sum(1, keepdims=True)


def switch_by_loop(probs, chosen):
    """J sum_i f_i P_i, f_i the share of (token, choice) pairs that i has, P_i its mean score."""
    share = np.bincount(chosen.ravel(), minlength=E) / chosen.size
    return E * (share * probs.mean(0)).sum()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_switch_is_its_formula(score):
    config = config_of("switch", score=score)
    router, x = router_params(D, config), tokens()
    found = statistics(router, x, config)
    probs = probabilities(router, x, config)
    wanted = switch_by_loop(probs, np.argsort(-probs, axis=1)[:, :K])
    np.testing.assert_allclose(found["balance"], wanted, rtol=1e-5)
    half = statistics(router, x, dataclasses.replace(config, balance_weight=0.5))
    np.testing.assert_allclose(half["balance"], wanted / 2, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_switch_is_one_for_an_even_load_and_as_many_as_experts_for_one_of_all(k):
    even = jnp.full(E, 40.0 * k / E)
    np.testing.assert_allclose(switch_balance(even, jnp.full(E, 40 / E), 40.0, k), 1, rtol=1e-6)
    one = jnp.zeros(E).at[0].set(40.0)
    np.testing.assert_allclose(switch_balance(one, one, 40.0, 1), E, rtol=1e-6)
    assert switch_balance(jnp.zeros(E), jnp.zeros(E), 0.0, k) == 0


def test_the_sequence_loss_is_the_mean_over_rows_that_hold_a_token():
    config = config_of("sequence", score="sigmoid")
    router, x = router_params(D, config), tokens()
    found = statistics(router, x, config, jnp.asarray(MASK_BT.reshape(-1)))
    probs = probabilities(router, x, config).reshape(ROWS, LENGTH, E)
    chosen = np.argsort(-probs, axis=2)[..., :K]
    by_row = [switch_by_loop(probs[b][m], chosen[b][m]) for b, m in enumerate(MASK_BT) if m.any()]
    assert len(by_row) == 3
    np.testing.assert_allclose(found["balance"], np.mean(by_row), rtol=1e-5)


def test_z_loss_is_the_mean_squared_logsumexp():
    config = config_of("none", z_weight=0.3)
    router, x = router_params(D, config), tokens()
    mask = MASK_BT.reshape(-1)
    z = np.asarray(gate_logits(router, x, config), np.float64)[mask]
    found = statistics(router, x, config, jnp.asarray(mask))
    np.testing.assert_allclose(found["z"], 0.3 * (np.log(np.exp(z).sum(1)) ** 2).mean(), rtol=1e-5)
    assert found["balance"] == 0


KINDS = {
    "switch": config_of("switch"),
    "sequence": config_of("sequence", score="sigmoid", weighting="renormalized"),
    "cv_squared": config_of("cv_squared"),
    "noisy": config_of("cv_squared", noise=True, jitter=0.1),
    "shared": MoEConfig(E, 3, gate="linear", noise=False, z_weight=1.0),
    "expert_choice": MoEConfig(E, K, **CONVENTIONS["expert_choice"], capacity_factor=0.4),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_what_padding_holds_changes_no_statistic(config):
    router, x, mask = router_params(D, config), tokens(), jnp.asarray(MASK_BT.reshape(-1))
    other = jnp.where(mask[:, None], x, 30 * tokens(seed=21))
    key = jax.random.key(0)
    first = statistics(router, x, config, mask, key)
    again = statistics(router, other, config, mask, key)
    for name in first:
        np.testing.assert_array_equal(again[name], first[name], err_msg=name)
    seen = statistics(router, other, config, None, key)
    assert not np.allclose(seen["counts"], first["counts"]), "the mask would do nothing"
    nothing = statistics(router, x, config, jnp.zeros_like(mask), key)
    assert all((value == 0).all() for value in nothing.values())


@functools.partial(jax.jit, static_argnums=(2, 4))
def on_mesh(router, x, config, mask, num_devices):
    """Statistics and the gradient of all losses, tokens split by rows over an axis."""

    def device(router, x, mask):
        routing = route(
            router, x, config, mask_N=mask, num_sequences=ROWS // num_devices, axis_names=("d",)
        )
        own = (routing.balance_loss, routing.z_loss, routing.shared_weight, routing.dropped)
        return jnp.stack(own), routing.counts_E

    def loss(router):
        split = (x.reshape(num_devices, -1, D), mask.reshape(num_devices, -1))
        values, counts = jax.vmap(device, in_axes=(None, 0, 0), axis_name="d")(router, *split)
        return values[0, 0] + values[0, 1], (values, counts)

    return jax.grad(loss, has_aux=True)(router)


MESH = {
    "switch": dataclasses.replace(KINDS["switch"], balance_scope="global"),
    "sequence": KINDS["sequence"],
    "cv_squared": dataclasses.replace(KINDS["cv_squared"], balance_scope="global"),
    "shared": dataclasses.replace(KINDS["shared"], balance_scope="global"),
    "expert_choice": KINDS["expert_choice"],
}


@pytest.mark.parametrize("config", MESH.values(), ids=MESH)
def test_losses_of_all_tokens_do_not_depend_on_how_they_are_split(config):
    router, x, mask = router_params(D, config), tokens(), jnp.asarray(MASK_BT.reshape(-1))
    gradient, (values, counts) = on_mesh(router, x, config, mask, 4)
    wanted_gradient, (wanted, wanted_counts) = on_mesh(router, x, config, mask, 1)
    for device in range(4):
        np.testing.assert_allclose(values[device], wanted[0], rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(counts[device], wanted_counts[0])
    for name, leaf in gradient.items():
        atol = 1e-5 * max(1e-3, np.abs(wanted_gradient[name]).max())
        np.testing.assert_allclose(leaf, wanted_gradient[name], rtol=0, atol=atol)
    plain = statistics(router, x, config, mask)
    np.testing.assert_allclose(wanted[0, 0], plain["balance"], rtol=1e-6)


@pytest.mark.parametrize("balance", ["switch", "cv_squared"])
def test_local_losses_are_the_mean_over_devices(balance):
    config = config_of(balance)
    router, x = router_params(D, config), tokens()
    whole = jnp.ones(ROWS * LENGTH, bool)
    _, (values, _) = on_mesh(router, x, config, whole, 2)
    alone = [on_mesh(router, part, config, m, 1)[1][0][0, 0] for part, m in halves(x, whole)]
    np.testing.assert_allclose(values[:, 0], np.mean(alone), rtol=1e-5)
    _, (pooled, _) = on_mesh(router, x, config, whole, 1)
    assert abs(pooled[0, 0] / np.mean(alone) - 1) > 1e-3  # so local and global are two losses


def halves(x, mask):
    """Each half of the tokens, the other half masked, as one device would see it."""
    middle = len(x) // 2
    for part in (slice(0, middle), slice(middle, None)):
        yield x, jnp.zeros_like(mask).at[part].set(True)
