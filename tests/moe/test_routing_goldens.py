"""Every family's MoE block as transformers computes it, from goldens: no torch needed here."""

import functools

import jax
import numpy as np
import pytest

from moejax.core.precision import TOLERANCE
from moejax.moe.layer import moe_layer
from moejax.moe.routing import route
from tests.parity.make_router_goldens import PATH, checksum
from tests.router_cases import CASES, MASK_BT, TOP_K, X_BTD, params_of


@functools.cache
def goldens():
    with np.load(PATH) as stored:
        return dict(stored)


@functools.partial(jax.jit, static_argnums=1)
def run(params, config, x_BTD):
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    routing = route(params["router"], x_ND, config)
    y, _ = moe_layer(params, x_BTD, config, implementation="cpu")
    return routing.experts_NK, routing.weights_NK, y


def assert_close(got, wanted):
    np.testing.assert_allclose(
        got, wanted, rtol=0, atol=TOLERANCE["float32"] * np.abs(wanted).max()
    )


def assert_equal_blocks(case, wanted):
    """Choices equal, weights and output close; `wanted` as `make_router_goldens.computed`."""
    experts, weights, y = (np.asarray(a) for a in run(params_of(case), case.config, X_BTD))
    order = np.argsort(experts, axis=1)
    np.testing.assert_array_equal(np.take_along_axis(experts, order, 1), wanted["experts"])
    assert_close(np.take_along_axis(weights, order, 1), wanted["weights"])
    assert_close(y, wanted["y"])


@pytest.mark.parametrize("name", CASES)
def test_block_equals_the_golden(name):
    golden = {key: goldens()[f"{name}/{key}"] for key in ("checksum", "experts", "weights", "y")}
    assert checksum(CASES[name]) == golden["checksum"], "the weights are drawn otherwise now"
    assert_equal_blocks(CASES[name], golden)


def test_the_groups_of_the_goldens_change_choices():
    for limited in ("deepseek_v2_groups", "deepseek_v3"):
        assert (goldens()[f"{limited}/experts"] != goldens()["deepseek_v2/experts"]).any()


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
@pytest.mark.parametrize("suffix", ["", "_masked"])
def test_hugging_face_s_balance_loss_is_top_k_times_ours(name, suffix):
    """Of one layer; over several, theirs pools tokens before it multiplies and ours adds losses."""
    case = CASES["mixtral"]
    mask_N = MASK_BT.reshape(-1) if suffix else np.ones(MASK_BT.size, bool)
    ours = losses_of(params_of(case)["router"], case.config, mask_N) / case.config.balance_weight
    assert_close(TOP_K * ours, goldens()[f"balance/{name}{suffix}"])


@functools.partial(jax.jit, static_argnums=1)
def losses_of(router, config, mask_N):
    return route(router, X_BTD.reshape(-1, X_BTD.shape[-1]), config, mask_N=mask_N).balance_loss
