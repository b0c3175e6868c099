"""Weights kept in float32 and used in 16 bits, with gradients that are never wider than that.

A weight that is cast at its use has a gradient that was computed in 16 bits and is widened by the
cast's transpose. For a scan over layers JAX then stacks float32 gradients, and XLA casts the whole
stack before the loop: 4 and 2 bytes per parameter that hold nothing new. A `Narrow` weight has
neither: its gradient is that of `slot`, which has the narrow dtype, and its cast stays in the loop.
The numbers are the same bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core import tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Narrow:
    """A weight [...] and, of its shape, the zeros that its gradient is taken of.

    Knows `shape`, `dtype` and `astype` to the dtype of `slot`: all that may be done with it.
    """

    value: jax.Array
    slot: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def astype(self, dtype: Any) -> jax.Array:
        """The weight in the dtype of its slot; ValueError for any other."""
        if jnp.dtype(dtype) != self.slot.dtype:
            raise ValueError(f"a weight narrowed to {self.slot.dtype} is asked for in {dtype}")
        return _cast(jax.lax.stop_gradient(self.value), self.slot)


def slots(params: tree.Tree, dtype: Any) -> tree.Tree:
    """What to differentiate by: narrow zeros for blocks' weights, else the weights themselves.

    Routers and adapters are used in their own dtype, so they stay.
    """
    narrow = jnp.dtype(dtype)

    def slot(path, w):
        wider = jnp.issubdtype(w.dtype, jnp.floating) and w.dtype.itemsize > narrow.itemsize
        apart = "moe/router" in path or "/lora/" in path
        inside = path.startswith("layers/") and not apart
        return jnp.zeros(w.shape, narrow) if wider and inside else w

    return tree.map_with_path(slot, params)


def narrowed(params: tree.Tree, slots: tree.Tree) -> tree.Tree:
    """Parameters for a loss, as functions of the slots of `slots`."""
    flat = tree.flatten(params)
    return tree.map_with_path(
        lambda path, slot: slot if slot.dtype == flat[path].dtype else Narrow(flat[path], slot),
        slots,
    )


@jax.custom_vjp
def _cast(value: jax.Array, slot: jax.Array) -> jax.Array:
    # A product with a one that the compiler cannot see through keeps the cast inside the loop.
    one = jax.lax.optimization_barrier(jnp.ones((), value.dtype))
    return (value * one).astype(slot.dtype)


_cast.defvjp(
    lambda value, slot: (_cast(value, slot), None),
    lambda _, grad: (None, grad),
)
