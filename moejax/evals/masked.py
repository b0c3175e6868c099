"""A model judged under masks that were decided from the prompt, and what decides them.

The prompt is read densely into a cache, once for all masks, as before decoding; what follows it is
then computed on that cache with the mask.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods import shadow_dejavu
from moejax.methods.shadow_mask import Mask, Sizes, inserted_of
from moejax.methods.shadow_rivals import griffin, thresholding
from moejax.models.cache import KVCache, init_cache
from moejax.models.config import ModelConfig
from moejax.models.inserted import Inserted
from moejax.models.masked import seen_of
from moejax.models.transformer import ForwardOptions, forward, unembed
from moejax.serve.prepare import bucket, power_of_two

_CHUNK = 64  # most positions whose logits over the vocabulary exist at one time
Pair = tuple[list[int], list[int]]  # a prompt, and what is scored after it


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of a batch: prompts [B, P], padded on the left, what follows [B, R], on the right.

    start_B: padding before each prompt. length_B: tokens that follow, at least 1. rows: which rows
    of all these are, the first ones of the batch; more are padding.
    """

    prompt_BP: np.ndarray
    start_B: np.ndarray
    rest_BR: np.ndarray
    length_B: np.ndarray
    rows: tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Read:
    """What a dense pass over the prompts gives.

    Attributes:
      signals: what a mask may be decided from: "context" [B, H * C] of layer 0 at the prompt's last
        token, "attn_in" and "mlp_in" [L, B, D] of every layer there, "griffin" [L, B, F].
      cache: the prompts' keys and values, with room for what follows.
      first_B: nats of the first token that follows, which no mask changes.
    """

    signals: dict[str, jax.Array]
    cache: KVCache
    first_B: jax.Array


def batches(
    pairs: Sequence[Pair], max_tokens: int, groups: Sequence[Sequence[int]] | None = None
) -> list[Batch]:
    """Batches of rows of similar length, the longest first.

    groups: rows that stay in one batch, as the choices of a question; None: each alone. A batch
    has at most max_tokens tokens, padding included, but one group at least. InputError for an empty
    prompt or nothing after it.
    """
    for at, (before, after) in enumerate(pairs):
        if not before or not after:
            raise InputError(
                f"row {at}: a prompt of {len(before)} tokens and {len(after)} after it"
            )

    def widths(rows: Sequence[int]) -> tuple[int, int]:
        before, after = (max(len(pairs[r][i]) for r in rows) for i in (0, 1))
        # What follows is computed for every mask, but for its last token, and answers are short:
        # steps as large as an eighth of it.
        step = min(32, max(4, power_of_two(after - 1) // 8))
        return bucket(before), 1 + max(1, -(-(after - 1) // step)) * step

    left = sorted(groups or [[at] for at in range(len(pairs))], key=widths, reverse=True)
    found, mine = [], list(left[0])
    for group in left[1:]:
        both = [*mine, *group]
        if power_of_two(len(both)) * sum(widths(both)) <= max_tokens:
            mine = both
        else:
            found.append(_batch(pairs, mine, widths(mine)))
            mine = list(group)
    return [*found, _batch(pairs, mine, widths(mine))]


def _batch(pairs: Sequence[Pair], rows: list[int], widths: tuple[int, int]) -> Batch:
    count = power_of_two(len(rows))
    prompt, rest = (np.zeros((count, width), np.int32) for width in widths)
    start, length = np.full(count, widths[0] - 1, np.int32), np.ones(count, np.int32)
    for row, at in enumerate(rows):
        before, after = pairs[at]
        prompt[row, widths[0] - len(before) :] = before
        rest[row, : len(after)] = after
        start[row], length[row] = widths[0] - len(before), len(after)
    return Batch(prompt, start, rest, length, tuple(rows))


def read_prompts(params: tree.Tree, config: ModelConfig, batch: Batch) -> Read:
    """Reads a batch's prompts densely."""
    places = (batch.prompt_BP, batch.start_B, batch.rest_BR[:, 0])
    return _read(params, config, places, batch.rest_BR.shape[1])


@functools.partial(jax.jit, static_argnames=("config", "room"))
def _read(params, config: ModelConfig, places, room: int) -> Read:
    prompt_BP, start_B, next_B = places
    num_rows, num_tokens = prompt_BP.shape
    mask_BP = jnp.arange(num_tokens) >= start_B[:, None]

    def last(part, x):
        return x, x[:, -1].reshape(num_rows, -1)

    inserted = Inserted(
        heads=last,
        attn_in=last,
        mlp_in=last,
        neurons=lambda part, a: (a, griffin(a, mask_BP)),
    )
    cache = init_cache(config, start_B, num_tokens + room)
    out = forward(params, config, prompt_BP, cache=cache, inserted=inserted)
    log_probs = jax.nn.log_softmax(unembed(params, config, out.hidden_BTD[:, -1]), axis=-1)
    first_B = -jnp.take_along_axis(log_probs, next_B[:, None], axis=-1)[:, 0]
    seen = seen_of(config, out.seen)
    signals = {name: seen[name] for name in ("attn_in", "mlp_in")}
    signals |= {"context": seen["heads"][0], "griffin": seen["neurons"]}
    assert isinstance(out.cache, KVCache)
    return Read(signals, out.cache, first_B)


def masked_nats(params, config: ModelConfig, batch: Batch, read: Read, mask: Mask, sizes: Sizes):
    """Nats [B] of what follows each prompt under masks: [B, L, units], one for each row, or
    [B, R - 1, L, units] for each token that follows but the last."""
    places = (batch.rest_BR, batch.length_B)
    return np.asarray(_masked(params, config, places, read, mask, sizes), np.float64)


def thresholded_nats(params, config: ModelConfig, batch: Batch, read: Read, limits) -> np.ndarray:
    """`masked_nats` under thresholds (`moejax.methods.shadow_rivals`)."""
    places = (batch.rest_BR, batch.length_B)
    return np.asarray(_thresholded(params, config, places, read, limits), np.float64)


def contexts(params: tree.Tree, config: ModelConfig, batch: Batch, read: Read) -> jax.Array:
    """Layer 0's context [B, R - 1, H * C] of what follows, which no mask changes."""
    return _contexts(params, config, batch.rest_BR, read)


@functools.partial(jax.jit, static_argnames="config")
def _contexts(params, config: ModelConfig, rest_BR, read: Read) -> jax.Array:
    inserted = Inserted(heads=lambda part, x: (x, x))
    out = forward(params, config, rest_BR[:, :-1], cache=read.cache, inserted=inserted)
    first_BTHC = seen_of(config, out.seen)["heads"][0]
    return first_BTHC.reshape(*first_BTHC.shape[:2], -1)


def deciding_nats(params, config: ModelConfig, batch: Batch, read: Read, how) -> np.ndarray:
    """`masked_nats` where DejaVu's predictors decide at every token.

    how: (their params, order, sizes, sparsity of heads and of blocks), see `shadow_dejavu`.
    """
    dejavu, order, sizes, sparsity = how
    places, index = (batch.rest_BR, batch.length_B), shadow_dejavu.in_order(order, sizes)
    keep = shadow_dejavu.kept(sizes, sparsity)
    nats = _deciding(params, config, places, read, (dejavu, index, keep), sizes)
    return np.asarray(nats, np.float64)


@functools.partial(jax.jit, static_argnames=("config", "sizes"))
def _deciding(params, config: ModelConfig, places, read: Read, how, sizes: Sizes):
    dejavu, index_LF, keep = how
    inserted = shadow_dejavu.deciding(dejavu, config, index_LF, sizes, keep)
    return _nats(params, config, places, read, inserted)


@functools.partial(jax.jit, static_argnames=("config", "sizes"))
def _masked(params, config: ModelConfig, places, read: Read, mask: Mask, sizes: Sizes):
    return _nats(params, config, places, read, inserted_of(mask, config, sizes))


@functools.partial(jax.jit, static_argnames=("config",))
def _thresholded(params, config: ModelConfig, places, read: Read, limits):
    return _nats(params, config, places, read, thresholding(config, limits))


def _nats(params, config: ModelConfig, places, read: Read, inserted: Inserted) -> jax.Array:
    (rest_BR, length_B), options = places, ForwardOptions()
    rest_BR, next_BR = rest_BR[:, :-1], rest_BR[:, 1:]
    num_rows, num_tokens = rest_BR.shape
    out = forward(params, config, rest_BR, cache=read.cache, options=options, inserted=inserted)
    num_pieces = -(-num_tokens // _CHUNK)
    size = -(-num_tokens // num_pieces)
    room = num_pieces * size - num_tokens

    def pieces(x):
        x = jnp.pad(x, ((0, 0), (0, room), *((0, 0),) * (x.ndim - 2)))
        return jnp.swapaxes(x.reshape(num_rows, -1, size, *x.shape[2:]), 0, 1)

    def one(piece):
        hidden_BPD, target_BP = piece
        logits_BPV = unembed(params, config, hidden_BPD)
        target = jnp.take_along_axis(logits_BPV, target_BP[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BPV, axis=-1) - target

    found = jax.lax.map(one, (pieces(out.hidden_BTD), pieces(next_BR)))
    nll_BR = jnp.swapaxes(found, 0, 1).reshape(num_rows, -1)[:, :num_tokens]
    # Entry t is of token t + 1 of what follows; the first one is the prompt's to predict.
    scored_BR = jnp.arange(num_tokens) < length_B[:, None] - 1
    return read.first_B + jnp.sum(jnp.where(scored_BR, nll_BR, 0.0), axis=1)
