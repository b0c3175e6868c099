"""Log-likelihoods of given tokens: what multiple choice, perplexity and harnesses ask for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions, forward, unembed
from moejax.serve.prepare import bucket, context_length, power_of_two

# (context, continuation), both as token ids.
Pair = tuple[Sequence[int], Sequence[int]]
# Positions whose logits over the vocabulary exist at one time.
_CHUNK = 128


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """What a model thinks of one continuation.

    Attributes:
      log_prob: sum of token_log_probs, nats.
      greedy: every token of it is the most likely one (of equal ones the lowest id).
      token_log_probs: ln p(token | what came before it), one per token, nats.
      top_ids, top_log_probs: per token the `num_top` most likely ones instead, best first.
    """

    log_prob: float
    greedy: bool
    token_log_probs: tuple[float, ...]
    top_ids: tuple[tuple[int, ...], ...] = ()
    top_log_probs: tuple[tuple[float, ...], ...] = ()


def log_likelihoods(
    params: tree.Tree,
    config: ModelConfig,
    pairs: Sequence[Pair],
    *,
    max_batch_tokens: int = 2048,
    num_top: int = 0,
    options: ForwardOptions = ForwardOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> list[Likelihood]:
    """ln p(continuation | context) = sum_t ln p(y_t | context, y_<t) of every pair, in order.

    Each text is read once, however many pairs ask for it (as choices of one token do), and only
    the scored positions meet the vocabulary. float32 log-softmax whatever `options` say.

    Args:
      params: the model's tree; `prepare`d, stacked or sharded over a mesh.
      config: the model.
      pairs: (context, continuation) token ids. A context holds at least one token, since the first
        token of a text has no probability: give the model's BOS or end-of-text id. An empty
        continuation has log_prob 0.
      max_batch_tokens: tokens, padding included, that are read at a time.
      num_top: how many of the most likely tokens to report at each position.
      options: how to compute.
      progress: called with (pairs done, pairs in all).

    Raises:
      InputError: an empty context, ids outside the vocabulary, a text longer than the model reads
        (its last token is not read and may be one more).
    """
    check_pairs(config, pairs)
    if max_batch_tokens < 1 or not 0 <= num_top <= config.vocab_size:
        raise InputError(
            f"max_batch_tokens must be 1 or more, got {max_batch_tokens}, and num_top between 0 "
            f"and {config.vocab_size}, got {num_top}"
        )
    params = jax.device_put(params)  # once, and not for every batch
    found: dict[int, Likelihood] = {}
    for batch in _batches(pairs, max_batch_tokens):
        asked = [index for _, indices in batch for index in indices]
        results = _score(params, config, pairs, batch, (num_top, options))
        found.update(zip(asked, results, strict=True))
        if progress is not None:
            progress(len(found), len(pairs))
    return [found[index] for index in range(len(pairs))]


def check_pairs(config: ModelConfig, pairs: Sequence[Pair]) -> None:
    """Raises InputError, naming the first pair that cannot be scored."""
    context_tokens = context_length(config)
    for index, (context, continuation) in enumerate(pairs):
        if len(context) == 0:
            raise InputError(f"pair {index} has an empty context: begin it with BOS or end of text")
        num_read = len(context) + len(continuation) - 1
        if num_read > context_tokens:
            raise InputError(
                f"pair {index} has {num_read} tokens to read and the model reads "
                f"{context_tokens}: cut its context on the left"
            )
        both = (*context, *continuation)
        wrong = next((t for t in both if not 0 <= t < config.vocab_size), None)
        if wrong is not None:
            raise InputError(
                f"pair {index} has token id {wrong} and the model knows 0 to "
                f"{config.vocab_size - 1}: does the tokenizer belong to the model?"
            )


# -- inside ----------------------------------------------------------------------------------------

# What the model reads, and the pairs that ask for it.
_Text = tuple[tuple[int, ...], list[int]]


def _batches(pairs: Sequence[Pair], max_tokens: int) -> list[list[_Text]]:
    """Texts of similar length together, the longest first: what does not fit fails at once."""
    texts: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        # Nothing follows the last token, so it is not read.
        texts.setdefault((*context, *continuation)[:-1] or (context[0],), []).append(index)
    waiting = sorted(texts.items(), key=lambda text: -len(text[0]))
    batches = []
    while waiting:
        rows = max(1, max_tokens // bucket(len(waiting[0][0])))
        batches.append(waiting[:rows])
        waiting = waiting[rows:]
    return batches


def _score(params, config, pairs, batch: list[_Text], how) -> list[Likelihood]:
    """The pairs of one batch, in the order in which its texts name them."""
    num_rows = power_of_two(len(batch))
    tokens_BT = np.zeros((num_rows, bucket(len(batch[0][0]))), np.int32)
    lengths_B = np.ones(num_rows, np.int32)
    places: list[tuple[int, int, int]] = []  # row, position that predicts, token that followed
    sizes = []
    for row, (text, indices) in enumerate(batch):
        tokens_BT[row, : len(text)] = text
        lengths_B[row] = len(text)
        for index in indices:
            context, continuation = pairs[index]
            at = range(len(context) - 1, len(context) - 1 + len(continuation))
            places += [(row, t, y) for t, y in zip(at, continuation, strict=True)]
            sizes.append(len(continuation))
    num_places = _CHUNK * power_of_two(max(1, -(-len(places) // _CHUNK)))
    places_M3 = np.zeros((num_places, 3), np.int32)
    if places:
        places_M3[: len(places)] = places
    out = _scores(params, config, tokens_BT, lengths_B, places_M3, how)
    ends = np.cumsum(sizes)[:-1]
    parts = [np.split(np.asarray(array)[: len(places)], ends) for array in out]
    return [_likelihood(*columns) for columns in zip(*parts, strict=True)]


def _likelihood(log_probs_M, greedy_M, top_ids_MK, top_log_probs_MK) -> Likelihood:
    found = Likelihood(
        log_prob=float(np.sum(log_probs_M, dtype=np.float64)),
        greedy=bool(greedy_M.all()),
        token_log_probs=tuple(log_probs_M.tolist()),
    )
    if not top_ids_MK.shape[1]:
        return found
    top_ids, top_log_probs = (
        tuple(tuple(row) for row in array.tolist()) for array in (top_ids_MK, top_log_probs_MK)
    )
    return dataclasses.replace(found, top_ids=top_ids, top_log_probs=top_log_probs)


@functools.partial(jax.jit, static_argnames=("config", "how"))
def _scores(params, config: ModelConfig, tokens_BT, lengths_B, places_M3, how):
    num_top, options = how
    index_T = jnp.arange(tokens_BT.shape[1])
    # Positions stop at a row's end: "dynamic" rope then sees the row's own length.
    positions_BT = jnp.minimum(index_T, lengths_B[:, None] - 1)
    segment_ids_BT = (index_T < lengths_B[:, None]).astype(jnp.int32)
    hidden_BTD = forward(
        params,
        config,
        tokens_BT,
        positions_BT=positions_BT,
        segment_ids_BT=segment_ids_BT,
        options=options,
    ).hidden_BTD
    hidden_MD = hidden_BTD[places_M3[:, 0], places_M3[:, 1]]

    def chunk(inputs):
        hidden_PD, targets_P = inputs
        log_probs_PV = jax.nn.log_softmax(unembed(params, config, hidden_PD), axis=-1)
        taken_P = jnp.take_along_axis(log_probs_PV, targets_P[:, None], axis=-1)[:, 0]
        greedy_P = jnp.argmax(log_probs_PV, axis=-1) == targets_P
        top_PK, ids_PK = jax.lax.top_k(log_probs_PV, num_top)
        return taken_P, greedy_P, ids_PK, top_PK

    chunks = (hidden_MD.reshape(-1, _CHUNK, hidden_MD.shape[-1]),)
    found = jax.lax.map(chunk, (*chunks, places_M3[:, 2].reshape(-1, _CHUNK)))
    return jax.tree.map(lambda x: x.reshape(len(places_M3), *x.shape[2:]), found)
