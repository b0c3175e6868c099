"""ESFT's split of a model: gradients of the chosen experts alone, everything else bit-identical."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods import esft
from moejax.methods.expert_config import ExpertConfig, moe_layers
from moejax.models import transformer
from moejax.train.loss import lm_loss
from moejax.train.optim import OptimConfig, make_optimizer
from moejax.train.state import init_state
from moejax.train.step import make_train_step
from tests import fake_devices
from tests.methods.test_expert_scores import batch_of, config_of

DEEPSEEK = "deepseek_v2-q_rank_groups_scaled_biases"


def model_of(name: str):
    config = config_of(name)
    params = transformer.init_params(
        dataclasses.replace(config, initializer_range=0.3), jax.random.key(0)
    )
    layers = moe_layers(config)
    chosen = ExpertConfig({layers[0]: (3, 1), layers[1]: (2,)}, shared_experts=True)
    batch = batch_of()
    batch["loss_mask"] = (batch["segment_ids"] > 0).astype(np.float32)
    return params, config, chosen, batch


@pytest.mark.parametrize("name", ["xft", pytest.param(DEEPSEEK, marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_whole_model(name):
    params, config, chosen, batch = model_of(name)
    trainable, frozen = esft.split_params(params, config, chosen)

    def loss(trainable, frozen):
        return lm_loss(esft.assemble(trainable, frozen), config, batch)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(trainable, frozen)
    wanted, whole = jax.jit(jax.value_and_grad(lambda p: lm_loss(p, config, batch)[0]))(params)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    flat = tree.flatten(whole)
    for run in esft.runs_of(config, chosen):
        for leaf, grad in grads["experts"][run.name].items():
            stack = flat[f"layers/{run.name}/moe/experts/{leaf}"]
            np.testing.assert_allclose(grad, stack[run.rows, run.ids], rtol=1e-4, atol=1e-6)
    for path, grad in esft.rest_of(grads).items():
        np.testing.assert_allclose(grad, flat[path], rtol=1e-4, atol=1e-6)
    assert tree.diff(esft.finish(trainable, params, config, chosen), params) == []


def test_training_moves_the_chosen_experts_and_nothing_else():
    params, config, chosen, batch = model_of(DEEPSEEK)
    chosen = dataclasses.replace(chosen, shared_experts=False)
    params = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), params)
    trainable, frozen = esft.split_params(params, config, chosen)
    optimizer = make_optimizer(OptimConfig("adamw", 1e-2, weight_decay=0.1), 3)
    state = init_state(jax.tree.map(jnp.asarray, trainable), optimizer)
    masters = tree.num_params(trainable)
    assert masters == 3 * 3 * 24 * 10  # three pairs, three matrices
    assert tree.num_params(state.opt_state) < 2 * masters + 8  # two moments, no more
    step = make_train_step(
        lambda t, f, b, rng: lm_loss(esft.assemble(t, f), config, b), optimizer
    )
    for _ in range(3):
        state, metrics = step(state, frozen, batch, jax.random.key(0))
    assert np.isfinite(float(metrics["loss"]))
    tuned = esft.finish(state.params, params, config, chosen)
    moved = {line.split(":")[0] for line in tree.diff(tuned, params)}
    assert moved == {f"layers/1/moe/experts/w_{x}" for x in ("gate", "up", "down")}
    for path in moved:
        new, old = (tree.flatten(t)[path] for t in (tuned, params))
        for row in range(2):
            for e in range(config.moe.num_experts):
                same = new[row, e].tobytes() == old[row, e].tobytes()
                assert same != (e in chosen.experts[moe_layers(config)[row]]), (path, row, e)


def test_what_is_no_expert_can_be_trained_too():
    params, config, _, _ = model_of("xft")
    chosen = ExpertConfig({0: (1,)}, non_expert_modules=True)
    trainable, frozen = esft.split_params(params, config, chosen)
    rest = set(esft.rest_of(trainable))
    assert rest == {p for p in tree.flatten(params) if "/experts/" not in p}
    assert all("/experts/" in path or "pairs/" in path for path in tree.flatten(frozen))


@pytest.mark.parametrize(
    ("experts", "words"),
    [({0: (7,)}, "expert 7 in layer 0"), ({5: (1,)}, "names layer 5"), ({}, "nothing to train")],
)
def test_experts_of_another_model_are_refused(experts, words):
    params, config, _, _ = model_of("xft")
    with pytest.raises(InputError, match=words):
        esft.split_params(params, config, ExpertConfig(experts))


@pytest.mark.slow
def test_eight_devices_do_what_one_does_and_hold_equally_much():
    done = subprocess.run(
        [sys.executable, "-m", "tests.methods.esft_mesh_case"],
        cwd=Path(__file__).parents[2],
        env=fake_devices.environment(8),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, found in json.loads(done.stdout).items():
        assert found["loss"] < 1e-5 and found["grads"] < 1e-4, (name, found)
        assert found["uneven"] == 0, (name, found)
