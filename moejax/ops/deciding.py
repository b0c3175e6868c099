"""Lists of what is kept that are made inside a step, of each row's scores, at every token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def decided(params: dict[str, Any], x_BTD: jax.Array, num_units: int) -> dict[str, Any]:
    """Weights with the list that their `ask` makes of this token; without one what was given.

    ask: w_1, w_2, and maybe keep_B as `best_of_rows` takes it. The list is as long as `kept` was.
    """
    if "ask" not in params:
        return params
    ask, length = params["ask"], params["kept"].shape[0]
    logits = (x_BTD[:, 0] @ ask["w_1"] @ ask["w_2"]).astype(jnp.float32)
    scores_BU = jax.nn.sigmoid(logits).reshape(len(x_BTD), num_units, -1).sum(-1)
    kept_K, weight_BK = best_of_rows(scores_BU, ask.get("keep_B"), length)
    made = {name: value for name, value in params.items() if name != "ask"} | {"kept": kept_K}
    return made if weight_BK is None else made | {"weight": weight_BK}


def best_of_rows(
    scores_BU: jax.Array, keep_B: jax.Array | None, length: int
) -> tuple[jax.Array, jax.Array | None]:
    """The units that some row keeps, each once, and each row's factors, 1 where it keeps one.

    Row b keeps its keep_B[b] best; all together may be no more than `length` (or all units). What
    is over of the list's length names a unit beside it again, under factors 0. A list of all units
    has each kept one at its own place. keep_B None: one row, which keeps the whole list and has no
    factors.
    """
    num_rows, num_units = scores_BU.shape
    if keep_B is None:
        return jnp.sort(jax.lax.top_k(scores_BU[0], length)[1]).astype(jnp.int32), None
    order_BU = jnp.argsort(-scores_BU, axis=-1, stable=True)
    wanted_BU = jnp.arange(num_units) < keep_B[:, None]
    has_BU = jnp.zeros(scores_BU.shape, bool)
    has_BU = has_BU.at[jnp.arange(num_rows)[:, None], order_BU].set(wanted_BU)
    any_U, units_U = jnp.any(has_BU, axis=0), jnp.arange(num_units, dtype=jnp.int32)
    if length == num_units:
        return jax.lax.cummax(jnp.where(any_U, units_U, 0)), has_BU.astype(jnp.float32)
    first_K = jnp.argsort(~any_U, stable=True)[:length].astype(jnp.int32)
    count = jnp.sum(any_U)
    kept_K = jnp.where(jnp.arange(length) < count, first_K, first_K[jnp.maximum(count - 1, 0)])
    weight_BK = jnp.where(jnp.arange(length) < count, has_BU[:, kept_K], False)
    return kept_K, weight_BK.astype(jnp.float32)
