"""What a training run is at a step: all of it, so that a checkpoint of it is enough to go on."""

from __future__ import annotations

import dataclasses
from typing import Any

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


def named(value: Any) -> tree.Tree:
    """Any pytree as nested dicts: a checkpoint then reads the same whatever optax calls a node.

    Inverse: `renamed`.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(value)
    return tree.unflatten({_name(path): leaf for path, leaf in leaves})


def renamed(names: tree.Tree, like: Any) -> Any:
    """The pytree of `like` with the leaves of nested dicts. Inverse: `named`."""
    flat = tree.flatten(names)
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(treedef, [flat[_name(path)] for path, _ in paths])


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
