"""Accumulated microbatches are one big batch; the state is donated; randomness follows the step."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.core.errors import InputError
from moejax.core.platform import device_kind, platform
from moejax.train.optim import OptimConfig, make_optimizer, make_schedule
from moejax.train.placement import StepProgram
from moejax.train.state import init_state
from moejax.train.step import StepOptions, make_train_step


def masked_mean(trainable, frozen, batch, rng):
    """Mean squared error over the rows that count."""
    error = (batch["x"] @ trainable["w"] + frozen["b"] - batch["y"]) ** 2
    count = batch["mask"].sum()
    loss = (error * batch["mask"]).sum() / jnp.maximum(count, 1.0)
    return loss, {"target_count": count, "abs": jnp.abs(loss), "row_count": jnp.float32(len(error))}


def problem(num_rows: int = 12):
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(num_rows, 3)).astype(np.float32),
        "y": rng.normal(size=num_rows).astype(np.float32),
        "mask": (np.arange(num_rows) % 5 != 0).astype(np.float32),
    }
    return {"w": jnp.ones(3)}, {"b": jnp.float32(0.5)}, batch


def one_step(accumulation: int, optimizer=None, loss_fn=masked_mean, mask=None):
    optimizer = optimizer or optax.sgd(0.1)
    trainable, frozen, batch = problem()
    if mask is not None:
        batch["mask"] = mask
    step = make_train_step(loss_fn, optimizer, StepOptions(accumulation))
    return step(init_state(trainable, optimizer), frozen, batch, jax.random.key(0))


@pytest.mark.parametrize("accumulation", [2, 3, 6, 12])
def test_accumulation_equals_one_big_batch(accumulation):
    whole, whole_metrics = one_step(1)
    parts, parts_metrics = one_step(accumulation)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-6)
    assert parts_metrics.keys() == whole_metrics.keys()
    for name in ("loss", "grad_norm", "target_count", "row_count"):
        assert float(parts_metrics[name]) == pytest.approx(float(whole_metrics[name]), rel=1e-5)


def test_accumulation_weighs_by_tokens_and_not_by_microbatch():
    """All that counts is in the first half: a mean of means would halve the gradient."""
    mask = np.array([1.0] * 6 + [0.0] * 6, np.float32)
    whole, _ = one_step(1, mask=mask)
    parts, _ = one_step(2, mask=mask)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-6)


def with_auxiliary(trainable, frozen, batch, rng):
    """As a mixture's balance loss: of all rows, whether they count or not."""
    loss, metrics = masked_mean(trainable, frozen, batch, rng)
    balance = 0.1 * jnp.mean(jnp.square(batch["x"] @ trainable["w"]))
    return loss + balance, metrics | {"balance_loss": balance}


@pytest.mark.parametrize("accumulation", [2, 3])
def test_a_batch_without_any_counted_token_still_has_its_auxiliary_loss(accumulation):
    mask = np.zeros(12, np.float32)
    whole, whole_metrics = one_step(1, loss_fn=with_auxiliary, mask=mask)
    parts, metrics = one_step(accumulation, loss_fn=with_auxiliary, mask=mask)
    assert float(whole_metrics["loss"]) > 0 == float(metrics["target_count"])
    for name in ("loss", "balance_loss", "grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(whole_metrics[name]), rel=1e-5)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-6)


@pytest.mark.parametrize("counted", [0, 1, 2])
def test_a_microbatch_without_a_counted_token_weighs_nothing_beside_one_with(counted):
    mask = np.zeros(12, np.float32)
    mask[4 * counted : 4 * counted + 3] = 1
    parts, metrics = one_step(3, loss_fn=with_auxiliary, mask=mask)
    trainable, frozen, batch = problem()
    alone = {k: v[4 * counted : 4 * counted + 4] for k, v in (batch | {"mask": mask}).items()}
    loss, wanted = with_auxiliary(trainable, frozen, alone, None)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["target_count"]) == 3
    grads = jax.grad(lambda t: with_auxiliary(t, frozen, alone, None)[0])(trainable)
    np.testing.assert_allclose(parts.params["w"], trainable["w"] - 0.1 * grads["w"], rtol=1e-5)


def test_gradient_norm_is_reported_before_clipping():
    _, free = one_step(1)
    _, clipped = one_step(1, optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(0.1)))
    assert float(free["grad_norm"]) == float(clipped["grad_norm"]) > 1e-3


def test_state_is_donated():
    optimizer = optax.sgd(0.1)
    trainable, frozen, batch = problem()
    state = init_state(trainable, optimizer)
    make_train_step(masked_mean, optimizer)(state, frozen, batch, jax.random.key(0))
    assert state.params["w"].is_deleted() and not frozen["b"].is_deleted()


def test_each_step_and_microbatch_draws_its_own_randomness():
    def noise(trainable, frozen, batch, rng):
        return jax.random.uniform(rng) + 0.0 * trainable["w"].sum(), {}

    optimizer = optax.sgd(0.1)
    trainable, frozen, batch = problem()

    def losses(accumulation):
        step = make_train_step(noise, optimizer, StepOptions(accumulation))
        state, seen = init_state(jax.tree.map(jnp.array, trainable), optimizer), []
        for _ in range(3):
            state, metrics = step(state, frozen, batch, jax.random.key(7))
            seen.append(float(metrics["loss"]))
        return seen

    assert len(set(losses(1))) == 3
    assert losses(1) == losses(1) != losses(2)


def test_bfloat16_parameters_accumulate_in_float32_and_stay_bfloat16():
    optimizer = optax.sgd(0.1)
    trainable, frozen, batch = problem()
    trainable = {"w": trainable["w"].astype(jnp.bfloat16)}
    step = make_train_step(masked_mean, optimizer, StepOptions(4))
    state, _ = step(init_state(trainable, optimizer), frozen, batch, jax.random.key(0))
    assert state.params["w"].dtype == jnp.bfloat16


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    trainable, frozen, batch = problem()
    optimizer = optax.adam(0.1)
    step = make_train_step(masked_mean, optimizer, StepOptions(skip_nonfinite=True))
    state = init_state(trainable, optimizer)
    state, first = step(state, frozen, batch, jax.random.key(0))
    before = jax.tree.map(np.asarray, state)
    poisoned = batch | {"y": batch["y"] * np.nan}
    state, second = step(state, frozen, poisoned, jax.random.key(0))
    assert (float(first["skipped_count"]), float(second["skipped_count"])) == (0.0, 1.0)
    assert int(state.step) == 2
    same = jax.tree.map(np.array_equal, (state.params, state.opt_state), before_parts(before))
    assert all(jax.tree.leaves(same))
    state, third = step(state, frozen, batch, jax.random.key(0))
    assert float(third["skipped_count"]) == 0.0 and np.isfinite(state.params["w"]).all()


def test_skipped_steps_have_their_step_of_the_schedule_and_no_other_count():
    """The learning rate that is applied is schedule(step), with which the loop logs it."""
    trainable, frozen, batch = problem()
    optimizer = make_optimizer(OptimConfig("adamw", lr=1.0), 6)
    step = make_train_step(masked_mean, optimizer, StepOptions(skip_nonfinite=True))
    plain = init_state(jax.tree.map(jnp.copy, trainable), optimizer)
    state = init_state(trainable, optimizer)
    plain, _ = step(plain, frozen, batch, jax.random.key(0))
    one_later = jax.tree.map(jnp.copy, plain)
    plain, _ = step(plain, frozen, batch, jax.random.key(0))
    state, _ = step(state, frozen, batch, jax.random.key(0))
    before = np.asarray(state.params["w"])
    state, _ = step(state, frozen, batch | {"y": batch["y"] * np.nan}, jax.random.key(0))
    state, _ = step(state, frozen, batch, jax.random.key(0))
    moved = np.asarray(state.params["w"]) - before
    unskipped = np.asarray(plain.params["w"]) - np.asarray(one_later.params["w"])
    schedule = make_schedule(OptimConfig(lr=1.0), 6)
    np.testing.assert_allclose(moved / unskipped, schedule(2) / schedule(1), rtol=1e-5)


def before_parts(state):
    return state.params, state.opt_state


def test_the_sum_of_gradients_has_the_dtype_that_was_asked_for():
    trainable, frozen, batch = problem()
    optimizer = optax.sgd(0.1)
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 2e-2)):
        step = make_train_step(masked_mean, optimizer, StepOptions(4, dtype))
        state, batch_ = init_state(jax.tree.map(jnp.copy, trainable), optimizer), batch
        text = str(jax.make_jaxpr(step)(state, frozen, batch_, jax.random.key(0)))
        assert ("bf16[3]" in text) == (dtype == "bfloat16")
        found, _ = step(state, frozen, batch, jax.random.key(0))
        whole, _ = one_step(1)
        np.testing.assert_allclose(found.params["w"], whole.params["w"], rtol=tolerance)
    with pytest.raises(InputError, match="accumulation_dtype 'int8' is unknown"):
        StepOptions(accumulation_dtype="int8")


def test_a_step_is_lowered_for_the_chip_of_its_mesh():
    """By its own name: what is chosen by chip would be another program's otherwise."""
    chip = SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
    step = SimpleNamespace(lower=lambda *_: (platform(), device_kind()))
    mesh = SimpleNamespace(devices=np.array([chip]))
    program = StepProgram(step, None, {}, {}, None, mesh, None)
    assert program.lower() == ("tpu", "TPU v6 lite")
