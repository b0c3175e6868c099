"""How many rows each group has, and what kernels would compute of that at every call."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
    """Sizes [E] for several products over the same rows, given in the sizes' place.

    tables: by name, what a kernel asks for (`moejax.ops.tpu_visits`); it makes what it does not
    find.
    """

    sizes_E: jax.Array
    tables: dict[str, Any]


GroupSizes = jax.Array | Prepared


def plain(group_sizes: GroupSizes) -> jax.Array:
    """The sizes alone."""
    return group_sizes.sizes_E if isinstance(group_sizes, Prepared) else group_sizes


def integers(group_sizes: GroupSizes) -> GroupSizes:
    """As int32, which those prepared are."""
    return group_sizes if isinstance(group_sizes, Prepared) else group_sizes.astype(jnp.int32)
