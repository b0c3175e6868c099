"""The estimate of a step's memory is near what XLA plans, and costs no array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from moejax.core import tree
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions
from moejax.train.loss import lm_loss
from moejax.train.memory import step_memory
from moejax.train.optim import OptimConfig, make_optimizer
from moejax.train.state import init_state
from moejax.train.step import make_train_step

CONFIG = ModelConfig("llama", 2048, 8, 128, 256, 4, 2, 32, tie_embeddings=True)
NAMES = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32}
BATCH = {
    name: jax.ShapeDtypeStruct((4, 64), dtype)
    for name, dtype in (NAMES | {"loss_mask": jnp.float32}).items()
}


def loss_with(remat: str):
    options = ForwardOptions(remat=remat)
    return lambda p, frozen, batch, rng: lm_loss(p, CONFIG, batch, rng, options)


def estimate(remat="none", accumulation=1, name="adafactor", dtype="float32"):
    optimizer = make_optimizer(OptimConfig(name=name), 8)
    params = transformer.abstract_params(CONFIG)
    return step_memory(loss_with(remat), optimizer, params, {}, BATCH, accumulation, dtype)


def test_estimate_is_near_what_xla_plans():
    optimizer = make_optimizer(OptimConfig(), 8)
    state = jax.eval_shape(
        lambda: init_state(transformer.init_params(CONFIG, jax.random.key(0)), optimizer)
    )
    step = make_train_step(loss_with("none"), optimizer)
    key = jax.eval_shape(lambda: jax.random.key(0))
    planned = step.lower(state, {}, BATCH, key).compile().memory_analysis()
    total = planned.argument_size_in_bytes + planned.temp_size_in_bytes
    assert estimate().total == pytest.approx(total, rel=0.3)


def test_each_part():
    params = tree.num_bytes(transformer.abstract_params(CONFIG))
    plain = estimate()
    assert plain.params == plain.grads == plain.updates == params
    assert estimate(name="adamw").opt_state > 2 * params > 20 * plain.opt_state
    assert estimate("full").activations < estimate("dots").activations < plain.activations
    parts = estimate(accumulation=4)
    assert parts.grads == 2 * params == 2 / 1.5 * estimate(accumulation=4, dtype="bfloat16").grads
    assert parts.activations < 0.5 * plain.activations
