"""Names of what is dear to compute again, which remat "dots" keeps beside plain matrix products.

A kernel or a loop is no `dot_general`, so a policy of `jax.checkpoint` finds its results by name
(`jax.ad_checkpoint.checkpoint_name`), given inside of a custom gradient where there is one.

ALWAYS is what every policy keeps, as it is small and took messages between devices: which experts
tokens chose and in which order they travel there, and a device's piece of XFT's shared expert.
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "blockwise_attention"
GROUPED = "grouped_product"
EXCHANGED = "exchanged_rows"
ROUTING = "routing"
SHARED = "shared_expert"
ALWAYS = (ROUTING, SHARED)


def keep(tree: Any, name: str) -> Any:
    """The same arrays, under that name."""
    return jax.tree.map(lambda array: checkpoint_name(array, name), tree)
