"""Random arrays and parameter trees by numpy: jax's generator compiles anew for every shape."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.models.config import ModelConfig
from moejax.models.transformer import abstract_params
from moejax.moe.config import MoEConfig
from moejax.moe.routing import abstract_router


def normal(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0):
    """float32 N(0, scale^2)."""
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def moved(params: Any, seed: int, scale: float) -> Any:
    """Every leaf with noise of its own added."""
    rng = np.random.default_rng(seed)
    return tree.map_with_path(
        lambda _, w: w + jnp.asarray(scale * rng.normal(size=w.shape), w.dtype), params
    )


def model_params(config: ModelConfig, scale: float = 0.2) -> Any:
    """A whole model: norms near one, everything else, biases too, N(0, scale^2)."""
    zeros = tree.map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, float(path.endswith("/scale")), leaf.dtype),
        abstract_params(config),
    )
    return moved(zeros, 0, scale)


def router_params(d_model: int, config: MoEConfig, seed: int = 0, scale: float = 1.0) -> Any:
    """A router that has opinions, its noise too."""
    shapes = abstract_router(d_model, config)
    return {name: normal(shape, seed + i, scale) for i, (name, shape) in enumerate(shapes.items())}
