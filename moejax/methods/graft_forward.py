"""A source's states, and a target's forward pass with bridges in it (`moejax.methods.graft`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core import tree
from moejax.methods.graft import (
    LAST,
    GraftConfig,
    Look,
    Reading,
    insert_after,
    insert_before,
    keys_values,
    look,
    read,
)
from moejax.models.config import ModelConfig
from moejax.models.inserted import Inserted
from moejax.models.transformer import Output, forward, split_layers

# Per target token all source tokens, also those of later text: what the reference sees.
SEES_ALL = jnp.iinfo(jnp.int32).max


def source_states(
    params: tree.Tree,
    config: ModelConfig,
    taps: tuple[int, ...],
    tokens_BS: jax.Array,
    **forward_args: Any,
) -> tuple[jax.Array, Output]:
    """What bridges read of a frozen source: states [B, S, D * len(taps)], without a gradient.

    taps as in `GraftConfig`. Keyword arguments as `moejax.models.transformer.forward`, a cache
    among them; the output is that of the forward pass.
    """
    inner = [tap for tap in taps if tap != LAST]
    shape = (len(inner), *tokens_BS.shape, config.d_model)
    options = forward_args.get("options")
    kept = jnp.zeros(shape, options.compute_dtype if options else "float32")

    def tapped(block, x_BTD, kept):
        for at, tap in enumerate(inner):
            kept = kept.at[at].set(jnp.where(block == tap, x_BTD.astype(kept.dtype), kept[at]))
        return x_BTD, kept

    inserted = Inserted(after=tapped, kept=kept) if inner else None
    params = jax.lax.stop_gradient(params)
    output = forward(params, config, tokens_BS, inserted=inserted, **forward_args)
    found = []
    for tap in taps:
        found.append(output.hidden_BTD if tap == LAST else output.kept[inner.index(tap)])
    return jax.lax.stop_gradient(jnp.concatenate(found, axis=-1)), output


def make_reading(
    bridge: tree.Tree,
    graft: GraftConfig,
    states_BSR: jax.Array,
    limit_BT: jax.Array,
    open_B: jax.Array | None = None,
    compute_dtype: str = "float32",
) -> Reading:
    """A bridge with what it reads of whole texts: states [B, S, R], limits [B, T]."""
    states_BSR = states_BSR.astype(compute_dtype)
    pairs = keys_values(bridge, read(bridge, graft, states_BSR))
    needed = states_BSR if graft.placement == "paper" else None
    return Reading(bridge, graft, pairs, limit_BT, needed, open_B)


def grafted(
    params: tree.Tree,
    config: ModelConfig,
    tokens_BT: jax.Array,
    readings: Mapping[str, Reading],
    **forward_args: Any,
) -> Output:
    """The target's forward pass with the bridges of every source, in the order of their names."""
    after = insert_after(readings)
    inserted = Inserted(
        before=insert_before(readings), after=lambda block, x, kept: (after(block, x), kept)
    )
    return forward(params, config, tokens_BT, inserted=inserted, **forward_args)


def inspect(
    params: tree.Tree,
    config: ModelConfig,
    tokens_BT: jax.Array,
    reading: Reading,
    **forward_args: Any,
) -> list[Look]:
    """What every layer of a bridge did with a text, first to last; not for "paper" bridges."""
    looks: list[Look] = []
    graft = reading.graft
    assert graft.placement != "paper"

    def seen(index: int, x_BTD):
        layer, pair = reading.layer(index)
        looks.append(look(layer, graft, x_BTD, pair, reading.limit_BT))
        return x_BTD + reading.added(index, x_BTD)

    def before(x_BTD):
        for index in range(graft.num_before if graft.placement == "before" else 0):
            x_BTD = seen(index, x_BTD)
        return x_BTD

    def after(block, x_BTD, kept):
        if graft.placement == "inside" and (block + 1) % graft.every == 0:
            x_BTD = seen(block // graft.every, x_BTD)
        return x_BTD, kept

    if not any(isinstance(run, tuple) for run in params["layers"].values()):
        params = split_layers(params)
    forward(params, config, tokens_BT, inserted=Inserted(before, after), **forward_args)
    return looks
