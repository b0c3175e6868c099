"""Neurons in another order: the same function, with what is used together lying together."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.models.masked import by_run, is_masked, one_neuron_shape

# Leaves of a feed-forward layer, and which of their dims counts neurons.
_DIM = {"w_gate": -1, "w_up": -1, "b_gate": -1, "b_up": -1, "w_down": -2}


def reordered(params: tree.Tree, config: ModelConfig, order_LF: np.ndarray) -> tree.Tree:
    """Params whose neuron j of layer l is neuron order[l, j] of the given ones.

    A neuron is a column of gate and up (with its biases) and a row of down, so logits stay the
    same up to the order in which the down projection sums. order_LF: int [L, F], of experts
    [L, E, F], every row a permutation (InputError if not). Inverse: `reordered` by
    `inverse(order)`.
    """
    order_LF = checked_order(order_LF)
    flat = tree.flatten(params)
    for run in config.runs:
        part = by_run(config, order_LF)[run.name]
        if part.shape[1:] != one_neuron_shape(config):
            raise InputError(
                f"the order of neurons is {list(part.shape[1:])} per layer, the model's "
                f"{list(one_neuron_shape(config))}"
            )
        if not is_masked(config, run):
            continue
        below = "mlp" if run.kind == "dense" else "moe/experts"
        for name, dim in _DIM.items():
            path = f"layers/{run.name}/{below}/{name}"
            if path in flat:
                index = part[..., None, :] if name in ("w_gate", "w_up") else part
                index = part[..., None] if name == "w_down" else index
                flat[path] = jnp.take_along_axis(jnp.asarray(flat[path]), index, axis=dim)
    return tree.unflatten(flat)


def inverse(order_LF: np.ndarray) -> np.ndarray:
    """The order that undoes one."""
    return np.argsort(checked_order(order_LF), axis=-1).astype(np.int32)


def checked_order(order_LF: np.ndarray) -> np.ndarray:
    """The order as int32; InputError unless every row is a permutation."""
    order_LF = np.asarray(order_LF)
    if not np.array_equal(
        np.sort(order_LF, -1), np.broadcast_to(np.arange(order_LF.shape[-1]), order_LF.shape)
    ):
        raise InputError("an order of neurons must name every neuron of a layer once")
    return order_LF.astype(np.int32)
