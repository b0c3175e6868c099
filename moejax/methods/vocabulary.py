"""A model cut down to the tokens that some texts need: fewer rows of embedding and head.

On those texts, and on all others that are made of the same tokens, tokenizer and hidden states stay
exactly what they were; logits are the old ones of the ids that are left, so likelihoods are those
of a softmax over fewer ids. For byte-level or other BPE without `ignore_merges`.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from moejax.core.errors import InputError
from moejax.io.loaded import Loaded
from moejax.io.tokenizer import Tokenizer


def prune_vocabulary(loaded: Loaded, texts: Iterable[str]) -> tuple[Loaded, np.ndarray]:
    """(the model with the ids that the texts use, old ids of the new ones in order).

    Kept as well: special tokens, single bytes, and every token on the way to a kept one, so that
    merges lead to the same ends. InputError for a model without a BPE tokenizer.
    """
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise InputError(f"{loaded.source} has no tokenizer: its vocabulary cannot be cut down")
    content = json.loads(tokenizer.backend.to_str())
    model = content["model"]
    if model["type"] != "BPE" or model.get("ignore_merges"):
        raise InputError(f"{loaded.source}: only a BPE vocabulary with merges can be cut down")
    texts = list(texts)
    found = tokenizer.backend.encode_batch(texts)
    used = {token for encoding in found for token in encoding.tokens}
    added = sorted(content["added_tokens"], key=lambda t: t["id"])
    used |= {t["content"] for t in added}
    used |= set(pre_tokenizers.ByteLevel.alphabet()) & model["vocab"].keys()
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    _close(used, merges)
    new = sorted((i, token) for token, i in model["vocab"].items() if token in used)
    new += [(t["id"], t["content"]) for t in added if t["content"] not in model["vocab"]]
    kept = np.array([i for i, _ in new])
    ids = {token: number for number, (_, token) in enumerate(new)}
    model["vocab"] = {token: ids[token] for _, token in new if token in model["vocab"]}
    model["merges"] = [pair for pair in merges if {*pair, "".join(pair)} <= used]
    content["added_tokens"] = [t | {"id": ids[t["content"]]} for t in added]
    place = {old: number for number, old in enumerate(kept.tolist())}
    cut = Tokenizer(
        Backend.from_str(json.dumps(content)),
        tokenizer.special,
        tuple(place[i] for i in tokenizer.eos_ids),
        tokenizer.chat_template,
        tokenizer.add_bos,
        tokenizer.model_max_length,
    )
    for text, encoding in zip(texts, found, strict=True):
        if [int(kept[i]) for i in cut.backend.encode(text).ids] != encoding.ids:
            raise InputError(f"the smaller vocabulary cuts a text otherwise: {text[:60]!r}")
    config = dataclasses.replace(loaded.config, vocab_size=len(kept))
    params = dict(loaded.params)
    params["embed"] = params["embed"] | {"tokens": params["embed"]["tokens"][kept]}
    if "lm_head" in params:
        params["lm_head"] = {"w": params["lm_head"]["w"][:, kept]}
    return dataclasses.replace(loaded, params=params, config=config, tokenizer=cut), kept


def _close(used: set[str], merges: list[list[str]]) -> None:
    """Adds the parts of every merge that leads to a used token."""
    parts: dict[str, list[str]] = defaultdict(list)
    for pair in merges:
        parts["".join(pair)] += pair
    todo = list(used)
    while todo:
        for part in parts.get(todo.pop(), ()):
            if part not in used:
                used.add(part)
                todo.append(part)
