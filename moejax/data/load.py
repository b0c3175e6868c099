"""Training and held-out conversations from whatever a run names as its data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moejax.core.errors import InputError
from moejax.data.examples import Record
from moejax.data.sources import load_records, split_heldout
from moejax.data.stdlib import Corpus, StdlibConfig, load_corpus

STDLIB = "stdlib"


@dataclass(frozen=True)
class DataConfig:
    """Where conversations come from.

    source: "stdlib" (the functions of the Python standard library), a .jsonl, .jsonl.gz or
    .parquet file, or a hub data set (owner/name).
    split: part of a hub data set. limit: most rows read of a file or hub data set.
    heldout_share: share held out. num_heldout: most held-out conversations kept.
    seed: order of the conversations.
    """

    source: str = STDLIB
    split: str = "train"
    limit: int | None = None
    heldout_share: float = 0.15
    num_heldout: int | None = None
    seed: int = 0
    stdlib: StdlibConfig = field(default_factory=StdlibConfig)


@dataclass(frozen=True)
class Data:
    """Conversations to train on and to judge by; `summary` (plain JSON) identifies them."""

    train: list[Record]
    heldout: list[Record]
    summary: dict[str, Any]


def load_data(config: DataConfig) -> Data:
    """Read, split and shuffle; the same config gives the same lists. InputError for bad data."""
    if config.source == STDLIB:
        data = _from_stdlib(config)
    else:
        data = _from_records(config)
    if not data.train:
        raise InputError(
            f"{config.source}: nothing is left to train on with a held-out share of "
            f"{config.heldout_share}; give a smaller share or more data"
        )
    heldout = data.heldout[: config.num_heldout]
    return Data(data.train, heldout, {**data.summary, "heldout_used": len(heldout)})


def stdlib_corpus(config: DataConfig) -> Corpus:
    """The functions of the standard library, split and ordered as a config has it."""
    settings = config.stdlib
    return load_corpus(
        StdlibConfig(settings.max_chars, settings.min_body_chars, config.heldout_share, config.seed)
    )


def _from_stdlib(config: DataConfig) -> Data:
    corpus = stdlib_corpus(config)
    train = [pair.record() for pair in corpus.train]
    return Data(train, [pair.record() for pair in corpus.heldout], corpus.summary())


def _from_records(config: DataConfig) -> Data:
    records = load_records(config.source, config.split, config.limit)
    content = json.dumps([[dict(m) for m in r.messages] for r in records], sort_keys=True)
    order = np.random.default_rng(config.seed).permutation(len(records))
    train, heldout = split_heldout([records[i] for i in order], config.heldout_share)
    summary = {
        "source": config.source,
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "train": len(train),
        "heldout": len(heldout),
    }
    return Data(train, heldout, summary)
