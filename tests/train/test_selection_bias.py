"""A selection bias moves against the load of the whole batch, and by nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.models.config import ModelConfig
from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.train.selection_bias import selection_bias_update
from moejax.train.state import init_state
from moejax.train.step import StepOptions, make_train_step

MOE = MoEConfig(4, 2, **{**CONVENTIONS["deepseek_v3"], "bias_rate": 0.01})
CONFIG = ModelConfig("llama", 61, 2, 16, 24, 4, 2, 8, moe=MOE)
COUNTS_BLJ = np.array(
    [[[4, 0, 2, 2], [1, 1, 1, 1]], [[0, 2, 2, 4], [2, 2, 2, 2]], [[4, 0, 4, 0], [0, 4, 0, 4]]],
    np.float32,
)


def loss_fn(params, frozen, batch, rng):
    """Stands in for a model: a loss that pulls at the bias, and the counts that the batch holds."""
    router = params["layers"]["0"]["moe"]["router"]
    loss = jnp.sum(router["w_out"] ** 2) + jnp.sum(router["b_select"])
    return loss, {"expert_count": batch.sum(axis=0), "target_count": jnp.ones(())}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_bias_moves_against_the_whole_batch_s_load(accumulation):
    router = {"w_out": jnp.ones((2, 16, 4)), "b_select": jnp.full((2, 4), 0.5)}
    params = {"layers": {"0": {"moe": {"router": router}}}}
    optimizer = optax.adamw(0.1, weight_decay=0.1)
    step = make_train_step(
        loss_fn, optimizer, StepOptions(accumulation), selection_bias_update(CONFIG)
    )
    state, _ = step(init_state(params, optimizer), {}, COUNTS_BLJ, jax.random.key(0))
    router = state.params["layers"]["0"]["moe"]["router"]
    # Sums over the batch: [8, 2, 8, 6], mean 6, and [3, 7, 3, 7], mean 5.
    moved = np.array([[-1, 1, -1, 0], [1, -1, 1, -1]])
    np.testing.assert_allclose(router["b_select"], 0.5 + 0.01 * moved, rtol=1e-6)
    assert (router["w_out"] < 1).all()


def test_a_model_without_one_needs_no_update():
    assert selection_bias_update(ModelConfig("llama", 61, 2, 16, 24, 4, 2, 8)) is None
    plain = ModelConfig("llama", 61, 2, 16, 24, 4, 2, 8, moe=MoEConfig(4, 3))
    assert selection_bias_update(plain) is None
