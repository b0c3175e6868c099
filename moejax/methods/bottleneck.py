"""Adapters inside a model (Houlsby et al., arXiv 1902.00751): the bridge's rival of equal size.

    x <- x + W_2 gelu(W_1 LN x + b_1) + b_2     after every n-th block, W_2 and b_2 started at 0
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.models.inserted import Inserted
from moejax.ops.norm import layer_norm

EPS = 1e-5


def equal_width(config: ModelConfig, every: int, num_params: int) -> int:
    """The width for which all adapters together come closest to so many parameters."""
    d, num = config.d_model, _num(config, every)
    return max(1, round((num_params / num - 3 * d) / (2 * d + 1)))


def init_adapters(key: jax.Array, config: ModelConfig, every: int, width: int) -> tree.Tree:
    """Adapters that change nothing yet, stacked [M, ...]."""
    d, num = config.d_model, _num(config, every)
    return {
        "norm": {"scale": jnp.ones((num, d)), "bias": jnp.zeros((num, d))},
        "w_in": jax.random.normal(key, (num, d, width)) * d**-0.5,
        "b_in": jnp.zeros((num, width)),
        "w_out": jnp.zeros((num, width, d)),
        "b_out": jnp.zeros((num, d)),
    }


def inserted(adapters: tree.Tree, every: int) -> Inserted:
    """For `moejax.models.transformer.forward`."""

    def added(index, x):
        one = jax.tree.map(
            lambda stack: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False).astype(
                x.dtype
            ),
            adapters,
        )
        normed = layer_norm(x, EPS, one["norm"]["scale"], one["norm"]["bias"])
        hidden = jax.nn.gelu(normed @ one["w_in"] + one["b_in"], approximate=False)
        return x + hidden @ one["w_out"] + one["b_out"]

    def after(block, x, kept):
        num = adapters["b_in"].shape[0]
        index = jnp.minimum(block // every, num - 1)
        return jax.lax.cond(
            (block + 1) % every == 0, lambda x: added(index, x), lambda x: x, x
        ), kept

    return Inserted(after=after)


def _num(config: ModelConfig, every: int) -> int:
    if not 1 <= every <= config.num_layers:
        raise InputError(f"every={every} must lie between 1 and the model's {config.num_layers}")
    return config.num_layers // every
