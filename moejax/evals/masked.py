"""A model judged under masks that were decided from the prompt, and what decides them.

The prompt is read densely, as before decoding; tokens after it are computed with the mask.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods.shadow_mask import Mask, Sizes, inserted_of
from moejax.methods.shadow_rivals import griffin, thresholding
from moejax.models.config import ModelConfig
from moejax.models.inserted import Inserted
from moejax.models.masked import seen_of
from moejax.models.transformer import ForwardOptions, forward, unembed
from moejax.serve.prepare import bucket, power_of_two

_CHUNK = 64  # positions whose logits over the vocabulary exist at one time


@dataclasses.dataclass(frozen=True)
class Batch:
    """Padded rows: tokens, where each prompt ends and each row, and which rows they were."""

    tokens_BT: np.ndarray
    prompt_B: np.ndarray
    length_B: np.ndarray
    rows: tuple[int, ...]


def batches(pairs: Sequence[tuple[list[int], list[int]]], max_tokens: int) -> list[Batch]:
    """Batches of (prompt, what follows), those of similar length together, the longest first.

    InputError for an empty prompt or nothing after it.
    """
    for at, (before, after) in enumerate(pairs):
        if not before or not after:
            raise InputError(
                f"row {at}: a prompt of {len(before)} tokens and {len(after)} after it"
            )
    order = sorted(range(len(pairs)), key=lambda at: -len(pairs[at][0]) - len(pairs[at][1]))
    found = []
    while order:
        width = bucket(sum(map(len, pairs[order[0]])))
        count = max(1, max_tokens // width)
        mine, order = order[:count], order[count:]
        count = min(count, power_of_two(len(mine)))
        shape = (count, width)
        tokens = np.zeros(shape, np.int32)
        prompt, length = np.ones((2, count), np.int32)
        for row, at in enumerate(mine):
            ids = [*pairs[at][0], *pairs[at][1]]
            tokens[row, : len(ids)] = ids
            prompt[row], length[row] = len(pairs[at][0]), len(ids)
        found.append(Batch(tokens, prompt, length, tuple(mine)))
    return found


@functools.partial(jax.jit, static_argnames=("config",))
def signals(params: tree.Tree, config: ModelConfig, tokens_BT, prompt_B) -> dict[str, jax.Array]:
    """What a dense pass over the prompts says: all that a mask may be decided from.

    "context" [B, H * C] of layer 0 at the prompt's last token, "attn_in" and "mlp_in" [L, B, D] of
    every layer there, "griffin" [L, B, F] over the prompt.
    """
    rows = jnp.arange(len(prompt_B))

    def last(part, x):
        return x, x[rows, prompt_B - 1].reshape(len(rows), -1)

    inserted = Inserted(
        heads=last,
        attn_in=last,
        mlp_in=last,
        neurons=lambda part, a: (a, griffin(a, prompt_B)),
    )
    out = forward(params, config, tokens_BT, inserted=inserted)
    seen = seen_of(config, out.seen)
    return {
        "context": seen["heads"][0],
        "attn_in": seen["attn_in"],
        "mlp_in": seen["mlp_in"],
        "griffin": seen["neurons"],
    }


def masked_nll(
    params: tree.Tree, config: ModelConfig, batch: Batch, mask: Mask, sizes: Sizes
) -> np.ndarray:
    """Nats per token [B, T] under a mask of each row ([B, L, units]); 0 where nothing is scored.

    Entry t is -ln p(token t | what came before); scored are the tokens after the prompt.
    """
    places = (batch.tokens_BT, batch.prompt_B, batch.length_B)
    return np.asarray(_masked(params, config, places, mask, sizes))


def thresholded_nll(params, config: ModelConfig, batch: Batch, limits) -> np.ndarray:
    """`masked_nll` under thresholds (`moejax.methods.shadow_rivals`)."""
    places = (batch.tokens_BT, batch.prompt_B, batch.length_B)
    return np.asarray(_thresholded(params, config, places, limits))


@functools.partial(jax.jit, static_argnames=("config", "sizes"))
def _masked(params, config: ModelConfig, places, mask: Mask, sizes: Sizes):
    return _nll(params, config, places, inserted_of(mask, config, sizes, places[1]))


@functools.partial(jax.jit, static_argnames=("config",))
def _thresholded(params, config: ModelConfig, places, limits):
    return _nll(params, config, places, thresholding(config, limits, places[1]))


def _nll(params, config: ModelConfig, places, inserted: Inserted) -> jax.Array:
    tokens_BT, prompt_B, length_B = places
    num_batch, num_tokens = tokens_BT.shape
    index_T = jnp.arange(num_tokens)
    segments_BT = (index_T < length_B[:, None]).astype(jnp.int32)
    positions_BT = jnp.minimum(index_T, length_B[:, None] - 1)
    hidden_BTD = forward(
        params,
        config,
        tokens_BT,
        positions_BT=positions_BT,
        segment_ids_BT=segments_BT,
        options=ForwardOptions(),
        inserted=inserted,
    ).hidden_BTD
    next_BT = jnp.roll(tokens_BT, -1, axis=1)
    room = -num_tokens % _CHUNK

    def pieces(x):
        x = jnp.pad(x, ((0, 0), (0, room), *((0, 0),) * (x.ndim - 2)))
        return jnp.swapaxes(x.reshape(num_batch, -1, _CHUNK, *x.shape[2:]), 0, 1)

    def one(piece):
        hidden_BPD, target_BP = piece
        log_probs = jax.nn.log_softmax(unembed(params, config, hidden_BPD), axis=-1)
        return jnp.take_along_axis(log_probs, target_BP[..., None], axis=-1)[..., 0]

    found = jax.lax.map(one, (pieces(hidden_BTD), pieces(next_BT)))
    nll_BT = -jnp.swapaxes(found, 0, 1).reshape(num_batch, -1)[:, :num_tokens]
    nll_BT = jnp.roll(nll_BT, 1, axis=1)  # now of the token itself
    scored_BT = (index_T >= prompt_B[:, None]) & (index_T < length_B[:, None])
    return jnp.where(scored_BT, nll_BT, 0.0)


# Decides a batch's mask, [B, L, units], from what `signals` said of it.
Decide = Callable[[dict[str, jax.Array], Batch], Mask]


def nats(per_batch: Sequence[tuple[Batch, Any]], num_rows: int) -> np.ndarray:
    """Sums of nats per row, in the rows' own order, from `masked_nll` of every batch."""
    sums = np.zeros(num_rows)
    for batch, nll_BT in per_batch:
        for row, at in enumerate(batch.rows):
            sums[at] = np.asarray(nll_BT[row], np.float64).sum()
    return sums
