"""A mixture-of-experts layer to be used alone: pure functions on a tree of arrays.

    from moejax import moe
    config = moe.MoEConfig(64, 6, **moe.CONVENTIONS["olmoe"])
    params = moe.init_moe(jax.random.key(0), d_model, d_ff, config)
    y_BTD, stats = moe.moe_layer(params, x_BTD, config)     # stats.counts_E, stats.balance_loss

`moejax.moe.dense` is the definition, `moejax.moe.layer` the way to compute it.
"""

from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.moe.dense import dense_moe
from moejax.moe.layer import MoEStats, init_moe, moe_layer, moe_shapes
from moejax.moe.routing import Routing, route
from moejax.moe.selection import update_selection_bias

__all__ = [
    "CONVENTIONS",
    "MoEConfig",
    "MoEStats",
    "Routing",
    "dense_moe",
    "init_moe",
    "moe_layer",
    "moe_shapes",
    "route",
    "update_selection_bias",
]
