"""The MoE layer equals its definition, forward and gradient, for every weighting and kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.precision import TOLERANCE
from moejax.moe.config import MoEConfig
from moejax.moe.dense import dense_moe
from moejax.moe.dispatch import combine, dispatch, plan
from moejax.moe.layer import moe_layer as plain_layer
from moejax.moe.routing import abstract_router
from moejax.ops.gated_ffn import gated_ffn
from moejax.ops.grouped_matmul import IMPLEMENTATIONS
from tests.draws import normal, router_params

D, F = 8, 12
moe_layer = jax.jit(plain_layer, static_argnames=("config", "activation", "implementation"))
CONFIGS = {
    "normalized": MoEConfig(4, 3),
    "unnormalized": MoEConfig(8, 6, weighting="unnormalized", gate="linear"),
    "selected": MoEConfig(5, 2, num_shared=0, weighting="selected"),
    "every_expert": MoEConfig(4, 4),
    "one_routed": MoEConfig(2, 2),
}


def make_params(config, bias=True, equal=False):
    lead = 1 if equal else config.num_experts
    shapes = {"w_gate": (D, F), "w_up": (D, F), "w_down": (F, D)}
    if bias:
        shapes |= {"b_gate": (F,), "b_up": (F,), "b_down": (D,)}
    experts = {
        name: jnp.broadcast_to(normal((lead, *shape), seed, 0.4), (config.num_experts, *shape))
        for seed, (name, shape) in enumerate(shapes.items())
    }
    return {"router": router_params(D, config, seed=10), "experts": experts}


def tokens():
    return normal((2, 25, D), seed=20)


def assert_close(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=TOLERANCE["float32"] * max(1e-6, np.abs(b).max())
        )


def outputs_and_gradients(layer, config):
    params, x = make_params(config), tokens()
    weight = normal(x.shape, seed=30)

    def loss(params, x):
        y = layer(params, x, config, rng=jax.random.key(1))
        return jnp.sum(weight * y), y

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)


# Every kernel once, every kind of layer with the CPU's (the kernels have a suite of their own) and
# with none: so few tokens go through every expert.
@pytest.mark.parametrize(
    ("name", "implementation"),
    [("normalized", kernel) for kernel in IMPLEMENTATIONS]
    + [(name, "cpu") for name in CONFIGS if name != "normalized"]
    + [(name, None) for name in CONFIGS],
)
def test_equals_the_definition(name, implementation):
    def layer(*args, **kwargs):
        return moe_layer(*args, **kwargs, implementation=implementation)[0]

    wanted = outputs_and_gradients(dense_moe, CONFIGS[name])
    assert_close(outputs_and_gradients(layer, CONFIGS[name]), wanted)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equal_experts_are_one_dense_layer_if_weights_sum_to_one(config):
    params, x = make_params(config, equal=True), tokens()
    y, _ = moe_layer(params, x, config)
    one = {name: stack[0] for name, stack in params["experts"].items()}
    dense = gated_ffn(one, x.reshape(-1, D), jax.nn.silu).reshape(x.shape)
    if config.has_unit_weights:
        assert_close(y, dense)
    else:
        ratio = y / dense
        assert (ratio >= 1 - 1e-4).all() and (ratio > 1.01).any()


def test_statistics():
    config, x = CONFIGS["normalized"], tokens()
    params = make_params(config)
    mask = jnp.arange(25)[None, :] < jnp.array([[25], [10]])
    _, stats = moe_layer(params, x, config, mask_BT=mask)
    assert stats.counts_E[0] == 35 and stats.counts_E[1:].sum() == 70
    assert 0 < stats.shared_weight < 1 and stats.dropped == 0 and stats.balance_loss > 0
    _, stats = moe_layer(make_params(CONFIGS["selected"]), x, CONFIGS["selected"])
    assert stats.shared_weight == 0 and stats.counts_E.sum() == 100


def test_what_padding_holds_does_not_move_a_real_token():
    config, x = CONFIGS["normalized"], tokens()
    params = make_params(config)
    other = x.at[1, 10:].set(1e3)
    first, again = (moe_layer(params, t, config)[0] for t in (x, other))
    np.testing.assert_allclose(again[0], first[0], atol=1e-4)
    np.testing.assert_allclose(again[1, :10], first[1, :10], atol=1e-4)


def test_dispatch_and_combine_are_inverse_and_transposed():
    experts_NK = jnp.array([[2, 0], [0, 1], [2, 1], [2, 3]])
    moves = plan(experts_NK, 5)
    np.testing.assert_array_equal(moves.group_sizes_E, [2, 2, 3, 1, 0])
    sorted_experts = experts_NK.reshape(-1)[moves.order_R]
    assert (jnp.diff(sorted_experts) >= 0).all()
    x = normal((4, D))
    halves = jnp.full((4, 2), 0.5)
    np.testing.assert_allclose(combine(dispatch(x, moves), halves, moves), x, rtol=1e-6)
    rows = normal((8, D), seed=1)
    pulled = jax.vjp(lambda x: dispatch(x, moves), x)[1](rows)[0]
    scattered = jnp.zeros_like(x).at[moves.order_R // 2].add(rows)
    np.testing.assert_allclose(pulled, scattered, rtol=1e-5)


def test_bfloat16_keeps_its_type():
    config = CONFIGS["normalized"]
    params, x = make_params(config), tokens()
    low = {**params, "experts": jax.tree.map(lambda w: w.astype("bfloat16"), params["experts"])}
    y, stats = moe_layer(low, x.astype("bfloat16"), config)
    assert y.dtype == jnp.bfloat16 and stats.counts_E.dtype == jnp.float32


def test_backward_keeps_no_gathered_weights():
    config = MoEConfig(8, 3)
    size = {"d": 128, "f": 128, "n": 2048}
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    params = {
        "router": {k: leaf(*s) for k, s in abstract_router(size["d"], config).items()},
        "experts": {
            "w_gate": leaf(8, size["d"], size["f"]),
            "w_up": leaf(8, size["d"], size["f"]),
            "w_down": leaf(8, size["f"], size["d"]),
        },
    }

    def loss(params, x):
        return jnp.sum(moe_layer(params, x, config, implementation="cpu")[0] ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(params, leaf(1, size["n"], size["d"])).compile()
    rows = 3 * size["n"]  # shared and two routed rows per token
    activations = rows * (6 * size["f"] + 4 * size["d"]) * 4
    gathered = 2 * size["n"] * size["d"] * size["f"] * 4  # a matrix per routed row
    temp = compiled.memory_analysis().temp_size_in_bytes
    assert temp < activations + 3 * 8 * size["d"] * size["f"] * 4 < gathered / 8
