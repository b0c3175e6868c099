"""Low-rank additions to a layer's weights: W + A B, put together when the layer is run."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core import tree


def adapted(layer: tree.Tree) -> tree.Tree:
    """A layer with what its "lora" dict adds to its weights, in float32, and without that dict.

    ``lora/<path>/a`` [.., I, R] and ``b`` [.., R, O] belong to ``<path>``, whose inputs multiply to
    I and outputs to O; leading dims (experts) are those of the weight. Adding before the product
    costs a training step the weight's whole gradient, of one layer at a time.
    """
    if "lora" not in layer:
        return layer
    flat = tree.flatten({name: part for name, part in layer.items() if name != "lora"})
    pairs: dict[str, dict[str, jax.Array]] = {}
    for path, leaf in tree.flatten(layer["lora"]).items():
        target, part = path.rsplit("/", 1)
        pairs.setdefault(target, {})[part] = leaf
    for path, pair in pairs.items():
        w = flat[path].astype(jnp.float32)
        product = jnp.matmul(pair["a"].astype(jnp.float32), pair["b"].astype(jnp.float32))
        flat[path] = w + product.reshape(w.shape)
    return tree.unflatten(flat)


def matrix_sizes(path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """(leading dims, inputs, outputs) of one layer's weight [.., in.., out..]."""
    lead = 1 if "/experts/" in f"/{path}" else 0
    num_inputs = 2 if path.endswith("/w_o") else 1
    inputs = math.prod(shape[lead : lead + num_inputs])
    return shape[:lead], inputs, math.prod(shape[lead + num_inputs :])


def adapter_shapes(path: str, shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a weight's two factors."""
    lead, inputs, outputs = matrix_sizes(path, shape)
    return {"a": (*lead, inputs, rank), "b": (*lead, rank, outputs)}


def is_matrix(path: str, shape: tuple[int, ...]) -> bool:
    """Whether one layer's leaf is a linear map."""
    name: Any = path.rsplit("/", 1)[1] if "/" in path else path
    return name.startswith("w_") and name != "w_noise" and len(shape) > 1
