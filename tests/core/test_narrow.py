"""Gradients of narrow weights: the bits of the plain ones, in fewer bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import narrow, tree
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions
from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.train.loss import lm_loss

DENSE = ModelConfig("llama", 64, 2, 16, 24, 4, 2, 8, initializer_range=0.3)
MOE = dataclasses.replace(DENSE, moe=MoEConfig(4, 2, **CONVENTIONS["mixtral"]))


@pytest.mark.parametrize(("config", "remat"), [(DENSE, "full"), (MOE, "nothing")])
def test_gradients_are_the_same_bits(config, remat):
    params = transformer.init_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 64)
    ones = jnp.ones_like(tokens)
    batch = {"tokens": tokens, "segment_ids": ones, "loss_mask": ones}
    batch["positions"] = jnp.broadcast_to(jnp.arange(12), (2, 12))
    options = ForwardOptions("bfloat16", remat)

    def loss(params):
        return lm_loss(params, config, batch, options=options)[0]

    slots = narrow.slots(params, "bfloat16")
    wanted = jax.jit(jax.value_and_grad(loss))(params)
    of_slots = jax.value_and_grad(lambda slots: loss(narrow.narrowed(params, slots)))
    found = jax.jit(of_slots)(slots)
    assert found[0] == wanted[0]
    flat = tree.flatten(found[1])
    narrowed = {path for path, grad in flat.items() if grad.dtype == jnp.bfloat16}
    assert any(path.endswith("attn/w_q") for path in narrowed)
    assert not any("router" in path or path.startswith("embed") for path in narrowed)
    for path, grad in tree.flatten(wanted[1]).items():
        np.testing.assert_array_equal(flat[path].astype(jnp.float32), grad, err_msg=path)


def test_what_is_not_wider_stays_as_it_is_and_another_dtype_is_refused():
    params = {"layers": {"a": {"w": jnp.ones((2, 3), jnp.bfloat16)}}, "embed": {"t": jnp.ones(3)}}
    slots = narrow.slots(params, "bfloat16")
    assert narrow.narrowed(params, slots) == slots
    with pytest.raises(ValueError, match="float16"):
        narrow.Narrow(jnp.ones(2), jnp.zeros(2, jnp.bfloat16)).astype("float16")
