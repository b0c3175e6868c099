"""Lists of what is kept that a layer makes itself, of what enters it, at every token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def decided(params: dict[str, Any], x_BTD: jax.Array, num_units: int) -> dict[str, Any]:
    """Weights with the list that their `ask` makes of this token; without one what was given.

    One row reads what it keeps. Several keep different units: all are read, under factors.
    """
    if "ask" not in params:
        return params
    ask, keep = params["ask"], params["kept"].shape[0]
    logits = (x_BTD[:, 0] @ ask["w_1"] @ ask["w_2"]).astype(jnp.float32)
    scores_BU = jax.nn.sigmoid(logits).reshape(len(x_BTD), num_units, -1).sum(-1)
    best_BK = jnp.sort(jax.lax.top_k(scores_BU, keep)[1], axis=-1).astype(jnp.int32)
    made = {name: value for name, value in params.items() if name != "ask"}
    if len(x_BTD) == 1:
        return made | {"kept": best_BK[0]}
    rows = jnp.arange(len(x_BTD))[:, None]
    weight_BU = jnp.zeros(scores_BU.shape).at[rows, best_BK].set(1)
    return made | {"kept": jnp.arange(num_units), "weight": weight_BU}
