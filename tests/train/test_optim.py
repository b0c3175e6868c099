"""Schedules follow their formulas; Adafactor acts per matrix; AdamW is optax's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.train.optim import (
    OptimConfig,
    check_patterns,
    make_optimizer,
    make_schedule,
    matrix_view,
    scale_by_adafactor,
)
from tests.train.adafactor_case import GOLDEN, gradients, parameters, run_ours


def expected_lr(config: OptimConfig, step: int, total: int) -> float:
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / (total - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    factor = {"linear": 1 - progress, "cosine": cosine, "constant": 1.0}[config.schedule]
    return config.lr * factor


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedule_is_its_formula(name, warmup):
    config = OptimConfig(lr=2e-3, schedule=name, warmup_steps=warmup)
    schedule = make_schedule(config, 11)
    for step in range(12):
        expected = expected_lr(config, step, 11)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-6, abs=1e-10), step


def test_schedule_of_only_warmup_ends_below_the_peak():
    schedule = make_schedule(OptimConfig(lr=1.0, warmup_steps=4), 4)
    assert [float(schedule(t)) for t in range(4)] == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"name": "sgd"}, "'sgd'"),
        ({"schedule": "step"}, "'step'"),
        ({"lr": -1.0}, "-1.0"),
        ({"lr": float("nan")}, "nan"),
    ],
)
def test_bad_config_is_named(fields, said):
    with pytest.raises(InputError, match=said):
        OptimConfig(**fields)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(InputError, match="warmup_steps 9 .* 8 steps"):
        make_schedule(OptimConfig(warmup_steps=9), 8)


@pytest.mark.parametrize(
    "path, shape, view",
    [
        ("embed/tokens", (7, 4), (0, 1, 1)),
        ("final_norm/scale", (4,), (0, 1, 0)),
        ("lm_head/w", (4, 7), (0, 1, 1)),
        ("layers/0/attn_norm/scale", (2, 4), (1, 1, 0)),
        ("layers/0/attn/w_q", (2, 4, 3, 2), (1, 1, 2)),
        ("layers/0/attn/w_o", (2, 3, 2, 4), (1, 2, 1)),
        ("layers/0/attn/b_q", (2, 3, 2), (1, 2, 0)),
        ("layers/0/attn/b_o", (2, 4), (1, 1, 0)),
        ("layers/0/mlp/w_up", (2, 4, 8), (1, 1, 1)),
        ("layers/0/mlp/b_up", (2, 8), (1, 1, 0)),
        ("layers/0/moe/experts/w_up", (2, 3, 4, 8), (2, 1, 1)),
        ("layers/0/moe/experts/b_up", (2, 3, 8), (2, 1, 0)),
        ("layers/0/moe/router/w_hidden", (2, 4, 3), (1, 1, 1)),
        ("0/alpha", (2, 7), (1, 1, 0)),
        ("0/alpha", (2, 3, 7), (2, 1, 0)),
        ("0/lam_logit", (2,), (1, 0, 0)),
    ],
)
def test_matrix_view(path, shape, view):
    assert tuple(matrix_view(path, shape)) == view


def test_adafactor_matches_torch_goldens():
    golden = json.loads((Path(__file__).parent / GOLDEN).read_text())
    ours = tree.flatten(run_ours())
    assert ours.keys() == golden["params"].keys()
    for path, value in ours.items():
        expected = np.asarray(golden["params"][path], np.float32).reshape(value.shape)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7, err_msg=path)


def test_adafactor_of_a_stack_is_the_stack_of_adafactors():
    """One layer (and one expert) alone gets the update that it gets inside the stack."""
    optimizer = scale_by_adafactor()
    params, grads = parameters(), gradients(0)
    update = jax.jit(optimizer.update)
    whole, state = update(grads, optimizer.init(params))
    path = "layers/0/moe/experts/w_up"
    for layer in range(2):
        for expert in range(3):
            grad = {"w": jnp.asarray(tree.flatten(grads)[path][layer, expert])}
            alone, _ = update(grad, optimizer.init(grad))
            got = tree.flatten(whole)[path][layer, expert]
            np.testing.assert_allclose(got, alone["w"], rtol=1e-6)
    assert tree.flatten(state.moments)[path + "/row"].shape == (2, 3, 4)
    assert tree.flatten(state.moments)[path + "/col"].shape == (2, 3, 8)


def test_adafactor_clips_each_matrix_by_its_own_size():
    """Constant gradients of two sizes: |u| is 1 for both before, the threshold after clipping."""
    both = jnp.stack([jnp.ones((3, 5)), 1e4 * jnp.ones((3, 5))])
    grad = {"layers": {"0": {"mlp": {"w_up": both}}}}
    optimizer = scale_by_adafactor(clip_threshold=0.5)
    update, _ = optimizer.update(grad, optimizer.init(grad))
    np.testing.assert_allclose(tree.flatten(update)["layers/0/mlp/w_up"], 0.5, rtol=1e-5)


def test_adafactor_leaves_a_zero_gradient_at_zero():
    grad = {"w": jnp.zeros((3, 5)), "b": jnp.zeros(3)}
    optimizer = scale_by_adafactor()
    update, _ = optimizer.update(grad, optimizer.init(grad))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(update))


def test_adafactor_of_bfloat16_keeps_float32_moments_and_updates():
    params = {"w": jnp.ones((3, 5), jnp.bfloat16)}
    optimizer = make_optimizer(OptimConfig(), 4)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert updates["w"].dtype == jnp.float32
    assert optax.apply_updates(params, updates)["w"].dtype == jnp.bfloat16
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"float32", "int32"}


def test_adamw_is_optax_adamw():
    config = OptimConfig(name="adamw", lr=1e-2, schedule="cosine", weight_decay=0.1, clip_norm=0.5)
    ours = make_optimizer(config, 6)
    schedule = make_schedule(config, 6)
    theirs = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(schedule, weight_decay=0.1))

    def run(optimizer):
        def update(grads, state, params):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
        state, jitted = optimizer.init(params), jax.jit(update)
        for step in range(3):
            grads = jax.tree.map(lambda p, s=step: jnp.cos(p * (s + jnp.arange(4))), params)
            params, state = jitted(grads, state, params)
        return params

    assert tree.diff(run(ours), run(theirs)) == []


TREE = {
    "embed": {"tokens": jnp.ones((6, 4))},
    "layers": {"0": {"attn": {"w_o": jnp.ones((2, 3, 2, 4)), "b_o": jnp.ones((2, 4))}}},
    "final_norm": {"scale": jnp.ones(4)},
}


def one_update(config: OptimConfig, grads=None) -> dict:
    optimizer = make_optimizer(config, 10)
    if grads is None:
        grads = jax.tree.map(jnp.ones_like, TREE)
    updates, _ = optimizer.update(grads, optimizer.init(TREE), TREE)
    return tree.flatten(updates)


def test_learning_rates_and_decay_follow_the_paths():
    plain = dict(name="adamw", lr=0.1, schedule="constant", weight_decay=0.5)
    whole = one_update(OptimConfig(**plain))
    scale = (("**/attn/**", 0.5), ("embed/*", 0.0))
    some = one_update(OptimConfig(**plain, no_decay=("**/b_*", "final_norm/**"), lr_scale=scale))
    assert float(whole["final_norm/scale"][0]) == pytest.approx(-0.1 * 1.5, rel=1e-5)
    assert float(some["final_norm/scale"][0]) == pytest.approx(-0.1, rel=1e-5)
    assert float(some["layers/0/attn/b_o"][0, 0]) == pytest.approx(-0.05, rel=1e-5)
    assert float(some["layers/0/attn/w_o"][0, 0, 0, 0]) == pytest.approx(-0.075, rel=1e-5)
    assert not some["embed/tokens"].any()


def test_muon_makes_each_matrix_orthogonal_and_leaves_the_rest_to_adam():
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), TREE)
    config = OptimConfig(name="muon", lr=1.0, schedule="constant")
    found = one_update(config, grads)
    for layer in found["layers/0/attn/w_o"].reshape(2, 6, 4):
        values = np.linalg.svd(np.asarray(layer), compute_uv=False) / (0.2 * math.sqrt(6))
        assert values.min() > 0.6 and values.max() < 1.3  # five Newton-Schulz steps bring it there
    flat = tree.flatten(grads)
    for path in ("embed/tokens", "final_norm/scale", "layers/0/attn/b_o"):
        np.testing.assert_allclose(np.sign(found[path]), -np.sign(flat[path]))


def test_a_pattern_that_fits_nothing_is_refused():
    check_patterns(["**/attn/w_*", "embed/**"], TREE, "train.freeze")
    with pytest.raises(InputError, match="train.freeze 'atn/\\*\\*' fits none of the 4 parameters"):
        check_patterns(["atn/**"], TREE, "train.freeze")
    with pytest.raises(InputError, match="lr_scale of embed must be 0 or more, got -1"):
        OptimConfig(lr_scale=(("embed", -1.0),))
