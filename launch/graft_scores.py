"""What the study of LLM Modules scores: bits of held-out bytes, and first words.

A first word is right where greedy continuation of the true text before it writes that word and
ends it there: with a causal model that is so exactly where the most likely token is the true one at
every token of the word, and the one after it would not go on with the word.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from launch.graft_loss import run_target, target_of
from launch.graft_setup import Setup
from launch.graft_train import rows_of
from moejax.data.grafting import GraftExample
from moejax.io.states import States
from moejax.io.tokenizer import Tokenizer
from moejax.models.transformer import unembed
from moejax.train.loss import targets

# (rows) -> (nats [B, T], most likely next ids [B, T]).
Predict = Callable[[dict[str, np.ndarray]], tuple[jax.Array, jax.Array]]


def predictor(setup: Setup, trainable, frozen) -> Predict:
    """Of the trained target with its bridge or adapters."""
    config = setup.target.config

    @jax.jit
    def run(trainable, frozen, rows):
        hidden = run_target(setup, trainable, frozen, rows, rows.get("states"))
        head = target_of(setup, trainable, frozen)
        return _read(lambda h: unembed(head, config, h), hidden, targets(rows)[0])

    return functools.partial(run, trainable, frozen)


def source_predictor(setup: Setup, head) -> Predict:
    """Of the source itself, from its states; with the target's tokenizer only."""
    config = setup.source.config

    @jax.jit
    def run(head, rows):
        return _read(lambda h: unembed(head, config, h), rows["states"], targets(rows)[0])

    return functools.partial(run, head)


def _read(logits_of, hidden_BTD, target_BT):
    """Rows one after the other, so that the logits of one alone exist."""

    def one(xs):
        logits = logits_of(xs[0])
        picked = jnp.take_along_axis(logits, xs[1][:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked, jnp.argmax(logits, axis=-1)

    return jax.lax.map(one, (hidden_BTD, target_BT))


def score(
    setup: Setup,
    predict: Predict,
    heldout: Sequence[GraftExample],
    states: States,
    first: int,
    causal: bool = False,
) -> dict[str, list[float]]:
    """Per held-out text: bits and bytes that count, first words right and in all.

    causal: every target token sees the source's tokens up to its own, whatever it was trained on.
    """
    size = setup.config.train.batch_size
    words = [first_words(e, setup.joined.target) for e in heldout]
    goes_on = _goes_on(setup.joined.target)
    found: dict[str, list[float]] = {n: [] for n in ("bits", "bytes", "right", "words")}
    for at in range(0, len(heldout), size):
        numbers = [min(at + i, len(heldout) - 1) for i in range(size)]
        rows = rows_of(setup, heldout, numbers, states, first)
        if causal:
            places = np.arange(1, rows["limits"].shape[1] + 1, dtype=np.int32)
            rows["limits"] = np.broadcast_to(places, rows["limits"].shape)
        nats_BT, best_BT = (np.asarray(x) for x in predict(rows))
        weight_BT = np.asarray(targets(rows)[1])
        for row in range(min(size, len(heldout) - at)):
            example = heldout[at + row]
            found["bits"].append(float((nats_BT[row] * weight_BT[row]).sum()) / math.log(2))
            found["bytes"].append(float(example.num_bytes))
            ids = example.target_ids
            hits = [
                all(best_BT[row, i - 1] == ids[i] for i in range(a, b))
                and not goes_on[best_BT[row, b - 1] % len(goes_on)]  # a head may have more ids
                for a, b in words[at + row]
            ]
            found["right"].append(float(sum(hits)))
            found["words"].append(float(len(hits)))
    return found


def free_score(
    setup: Setup,
    predict: Predict,
    heldout: Sequence[GraftExample],
    states: States,
    first: int,
    per_text: int,
) -> dict[str, list[float]]:
    """The same of some first words a text, where nothing later exists yet.

    Before every token both models read the text so far anew, as the reference generates: all its
    tokens see all of the source's states that there are by then. As long as what was written is
    the true word those states are the true text's own, so the source need not run.
    """
    goes_on = _goes_on(setup.joined.target)
    jobs = []  # (text, first and last token of the word, token before the one that is predicted)
    for text, example in enumerate(heldout):
        words = first_words(example, setup.joined.target)
        chosen = words[:: max(1, len(words) // per_text)][:per_text]
        jobs += [(text, a, b, p) for a, b in chosen for p in range(a - 1, b)]
    seen: dict[tuple[int, int, int], tuple[float, int]] = {}
    size = setup.config.train.batch_size
    for at in range(0, len(jobs), size):
        part = [jobs[min(at + i, len(jobs) - 1)] for i in range(size)]
        rows = rows_of(setup, heldout, [job[0] for job in part], states, first)
        places = np.arange(rows["tokens"].shape[1])
        upto = np.array([job[3] + 1 for job in part], np.int32)[:, None]
        rows["limits"] = np.broadcast_to(upto, rows["limits"].shape).astype(np.int32)
        # The target is causal by itself: what stands after p moves nothing before it.
        rows["segment_ids"] = np.where(places[None] <= upto, rows["segment_ids"], 0)
        nats_BT, best_BT = (np.asarray(x) for x in predict(rows))
        for row, (text, a, _, p) in enumerate(part):
            seen[text, a, p] = (float(nats_BT[row, p]), int(best_BT[row, p]))
    found = {n: [0.0] * len(heldout) for n in ("bits", "bytes", "right", "words")}
    for text, a, b in {(t, a, b): None for t, a, b, _ in jobs}:
        ids = heldout[text].target_ids
        found["bits"][text] += sum(seen[text, a, p][0] for p in range(a - 1, b - 1)) / math.log(2)
        word = setup.joined.target.decode(ids[a:b])
        found["bytes"][text] += len(word.encode())
        hit = all(seen[text, a, p][1] == ids[p + 1] for p in range(a - 1, b - 1))
        found["right"][text] += float(hit and not goes_on[seen[text, a, b - 1][1]])
        found["words"][text] += 1.0
    return found


def first_words(example: GraftExample, tokenizer: Tokenizer, context: int = 16) -> list[tuple]:
    """(first token, end) of every whole counted word of letters with some text before it."""
    texts = [tokenizer.decode([i]) for i in example.target_ids]
    found, at = [], context
    while at < len(texts):
        end = at + 1
        if texts[at].startswith(" ") and texts[at][1:2].isalpha():
            while end < len(texts) and texts[end][:1].isalnum():
                end += 1
            if end < len(texts) and all(example.counted[at:end]):
                found.append((at, end))
        at = end
    return found


def _goes_on(tokenizer: Tokenizer) -> np.ndarray:
    """Per id: whether it goes on with the word before it."""
    ids = [[i] for i in range(tokenizer.vocab_size)]
    return np.array([text[:1].isalnum() for text in tokenizer.backend.decode_batch(ids)])
