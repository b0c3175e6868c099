"""The MoE layer equals its definition, forward and gradient, for every weighting and kernel."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.precision import TOLERANCE
from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.moe.dense import dense_moe
from moejax.moe.dispatch import combine, dispatch, plan
from moejax.moe.layer import moe_layer as plain_layer
from moejax.moe.layer import moe_shapes
from moejax.moe.routing import abstract_router
from moejax.moe.scores import gate_logits, scores
from moejax.moe.shapes import init_moe
from moejax.ops.gated_ffn import gated_ffn
from moejax.ops.grouped_matmul import IMPLEMENTATIONS, PLATFORM
from tests.draws import normal, router_params

D, F = 8, 12
moe_layer = jax.jit(plain_layer, static_argnames=("config", "activation", "implementation"))
XFT = {
    "normalized": MoEConfig(4, 3),
    "unnormalized": MoEConfig(8, 6, weighting="unnormalized", gate="linear"),
    "selected": MoEConfig(5, 2, num_shared=0, weighting="selected"),
    "every_expert": MoEConfig(4, 4),
    "one_routed": MoEConfig(2, 2),
}
GROUPS: dict[str, Any] = {"num_groups": 4, "top_groups": 2, "scale": 2.5, "shared_ffn": 10}


def like(name: str, **fields: Any) -> MoEConfig:
    return MoEConfig(8, 3, **(CONVENTIONS[name] | fields))


FAMILIES = {
    "mixtral": like("mixtral", jitter=0.1, soft_cap=2.0, z_weight=0.1),
    "olmoe": like("olmoe", noise=True, balance="cv_squared"),
    "qwen2_moe": like("qwen2_moe", shared_ffn=10, expert_ffn=6),
    "deepseek_v2": like("deepseek_v2", **GROUPS),
    "deepseek_v3": like("deepseek_v3", **GROUPS, gate="mlp"),
    "expert_choice": like("expert_choice", capacity_factor=1.25),
}
CONFIGS = XFT | FAMILIES


def make_params(config, bias=True, equal=False):
    params = {}
    for seed, (path, shape) in enumerate(moe_shapes(D, F, config, bias).items()):
        part, name = path.split("/")
        if part == "router":
            continue
        if part == "experts" and equal:
            one = normal((1, *shape[1:]), seed, 0.4)
            params.setdefault(part, {})[name] = jnp.broadcast_to(one, shape)
        else:
            params.setdefault(part, {})[name] = normal(shape, seed, 0.4)
    return params | {"router": router_params(D, config, seed=10)}


def tokens():
    return normal((2, 25, D), seed=20)


def mask():
    """25 real tokens and 10."""
    return jnp.arange(25)[None, :] < jnp.array([[25], [10]])


def assert_close(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=TOLERANCE["float32"] * max(1e-6, np.abs(b).max())
        )


def outputs_and_gradients(layer, config):
    params, x = make_params(config), tokens()
    weight = normal(x.shape, seed=30)

    def loss(params, x):
        y = layer(params, x, config, mask_BT=mask(), rng=jax.random.key(1))
        return jnp.sum(weight * y), y

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)


@functools.cache
def definition(name):
    return outputs_and_gradients(dense_moe, CONFIGS[name])


# Every kernel for one router of each way to choose, every router with the CPU's (the kernels have a
# suite of their own) and with none: so few tokens go through every expert.
KERNELS = [name for name in IMPLEMENTATIONS if name not in ("cpu", *PLATFORM)]
ONCE = ("normalized", "expert_choice")
PAIRS = [(name, kernel) for name in CONFIGS for kernel in ("cpu", None)]
PAIRS += [(name, kernel) for name in ONCE for kernel in KERNELS]
SLOW_PAIRS = [(name, kernel) for name in CONFIGS if name not in ONCE for kernel in KERNELS]


def test_mixtral_s_experts_see_the_jittered_input_and_other_families_do_not():
    rng, x_BTD = jax.random.key(3), tokens()
    keys = [jax.random.fold_in(jax.random.fold_in(rng, token), 1) for token in range(50)]
    noise_ND = jnp.stack([jax.random.uniform(key, (D,), jnp.float32, 0.9, 1.1) for key in keys])
    config = FAMILIES["mixtral"]
    params = make_params(config)
    found_BTD, _ = plain_layer(params, x_BTD, config, rng=rng)
    expected_BTD, _ = plain_layer(params, x_BTD * noise_ND.reshape(x_BTD.shape), config)
    assert jnp.array_equal(found_BTD, expected_BTD)
    other = dataclasses.replace(config, jitter_experts=False)
    other_BTD, _ = plain_layer(params, x_BTD, other, rng=rng)
    assert float(jnp.max(jnp.abs(found_BTD - other_BTD))) > 1e-2


@pytest.mark.parametrize(("name", "implementation"), PAIRS)
def test_equals_the_definition(name, implementation):
    def layer(*args, **kwargs):
        return plain_layer(*args, **kwargs, implementation=implementation)[0]

    assert_close(outputs_and_gradients(layer, CONFIGS[name]), definition(name))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation"), SLOW_PAIRS)
def test_equals_the_definition_for_every_other_pair(name, implementation):
    test_equals_the_definition(name, implementation)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_all_that_is_learned(name):
    (d_params, d_x), _ = definition(name)
    for path, gradient in tree.flatten(d_params).items():
        learned = path != "router/b_select"
        assert (np.abs(gradient).max() > 0) == learned, path
    assert np.abs(d_x).max() > 0


@pytest.mark.parametrize("name", [name for name in CONFIGS if not CONFIGS[name].shared_ffn])
def test_equal_experts_are_one_dense_layer_if_weights_sum_to_one(name):
    config = CONFIGS[name]
    params, x = make_params(config, equal=True), tokens()
    y, _ = moe_layer(params, x, config)
    one = {name: stack[0] for name, stack in params["experts"].items()}
    dense = gated_ffn(one, x.reshape(-1, D), jax.nn.silu).reshape(x.shape)
    if config.has_unit_weights:
        assert_close(y, dense)
        return
    total = np.asarray(jnp.sum(y * dense, axis=-1) / jnp.sum(dense * dense, axis=-1))
    assert_close(y, total[..., None] * dense)
    assert np.abs(total - 1).max() > 0.01
    if config.weighting == "unnormalized":
        assert (total >= 1 - 1e-4).all()


def test_statistics():
    config, x = CONFIGS["normalized"], tokens()
    params = make_params(config)
    _, stats = moe_layer(params, x, config, mask_BT=mask())
    assert stats.counts_E[0] == 35 and stats.counts_E[1:].sum() == 70
    assert 0 < stats.shared_weight < 1 and stats.dropped == 0 and stats.balance_loss > 0
    _, stats = moe_layer(make_params(CONFIGS["selected"]), x, CONFIGS["selected"])
    assert stats.shared_weight == 0 and stats.counts_E.sum() == 100


@pytest.mark.parametrize("name", CONFIGS)
def test_what_padding_holds_moves_neither_a_real_token_nor_a_statistic(name):
    params, x, key = make_params(CONFIGS[name]), tokens(), jax.random.key(2)
    other = x.at[1, 10:].set(1e3 * x[1, 10:][::-1])

    @jax.jit
    def run(x):
        return plain_layer(params, x, CONFIGS[name], mask_BT=mask(), rng=key, implementation="cpu")

    (first, stats), (again, other_stats) = run(x), run(other)
    assert_close(again[0], first[0])
    assert_close(again[1, :10], first[1, :10])
    assert_close(other_stats, stats)


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


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "expert_choice"])
def test_a_trace_holds_each_token_s_experts_and_their_raw_scores(name):
    config = CONFIGS[name]
    params, x_BTD = make_params(config), normal((2, 5, D), 3)
    _, stats = jax.jit(plain_layer, static_argnames=("config", "trace"))(
        params, x_BTD, config=config, trace=True
    )
    trace = stats.trace
    assert trace.experts_BTK.shape == (2, 5, config.routed_per_token)
    first = config.num_shared
    counts_E = np.bincount(trace.experts_BTK.reshape(-1), minlength=config.num_experts)
    np.testing.assert_array_equal(counts_E[first:], stats.counts_E[first:])
    logits_BTJ = gate_logits(params["router"], x_BTD.reshape(-1, D), config).reshape(2, 5, -1)
    scores_BTJ = scores(logits_BTJ.reshape(10, -1), config).reshape(2, 5, -1)
    wanted = jnp.take_along_axis(scores_BTJ, trace.experts_BTK - first, axis=2)
    np.testing.assert_allclose(trace.scores_BTK, wanted, rtol=1e-6)
    assert plain_layer(params, x_BTD, config)[1].trace is None


def test_what_does_not_fit_is_named_with_both_numbers():
    config = MoEConfig(4, 2)
    params = init_moe(jax.random.key(0), 8, 12, config)
    with pytest.raises(InputError, match=r"x \[B, T, 8\].*not \[2, 3, 9\]"):
        plain_layer(params, jnp.ones((2, 3, 9)), config)
    with pytest.raises(InputError, match="hold 4 experts and config.num_experts is 6"):
        plain_layer(params, jnp.ones((2, 3, 8)), MoEConfig(6, 2))
