"""What a training run is at a step: all of it, so that a checkpoint of it is enough to go on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from moejax.core import tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: updates done (int32 scalar); params: what is trained; opt_state: the optimizer's.

    Randomness and data are functions of `step` alone, so they need no place here.
    """

    step: jax.Array
    params: tree.Tree
    opt_state: optax.OptState


def init_state(params: tree.Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
