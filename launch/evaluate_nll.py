"""Held-out loss: nats per answer token of examples that were not trained on."""

from __future__ import annotations

from typing import Any

from launch.evaluate_keep import keeping
from launch.evaluate_settings import CLAIM, Outcome, Settings, console, describe, load_model
from moejax.core.errors import InputError
from moejax.data.examples import encode_records
from moejax.data.load import DataConfig, load_data
from moejax.data.packing import Packed, pack
from moejax.evals import nll
from moejax.io.load import Loaded
from moejax.train.loop import claim_folder

_NUM = 64


def evaluate(settings: Settings) -> Outcome | None:
    """Reads held-out examples and prints nats per answer token; None for a dry run."""
    loaded = load_model(settings)
    packed = _heldout(loaded, settings)
    if settings.dry_run:
        describe(loaded)
        stats = packed.stats
        console.print(
            f"{stats.num_examples} examples in {stats.num_rows} rows of {settings.seq_len}, "
            f"{stats.num_answer_tokens} answer tokens",
            markup=False,
        )
        return None
    asked = {
        "task": "nll",
        "model": settings.model,
        "data": settings.data or "stdlib",
        "num": settings.num or _NUM,
        "seq_len": settings.seq_len,
        "dtype": settings.dtype,
        "seed": settings.seed,
        "tokens_sha256": nll.tokens_hash(packed),
    }
    claim_folder(settings.out, asked, CLAIM)
    with keeping(settings, sum(map(len, packed.ids)), _so_far) as (done, keep):
        measured = nll.evaluate(
            loaded.params,
            loaded.config,
            packed,
            batch_size=settings.batch_size or 4,
            options=settings.options,
            done=done,
            on_records=lambda new: keep(_numbered(new)),
        )
    interval = measured.interval()
    result = {
        "nll": interval.mean,
        "nll_interval": [interval.low, interval.high],
        "nll_tokens": measured.num_tokens,
        "num_examples": len(measured.ids),
        "packing": packed.stats.to_json(),
    }
    console.print(
        f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}] nats per answer token, "
        f"{measured.num_tokens} tokens of {len(measured.ids)} examples",
        markup=False,
    )
    return asked, _numbered(measured.records()), result


def _numbered(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As every task's records are: of each example there is one sample."""
    return [record | {"sample": 0} for record in records]


def _so_far(records: list[dict[str, Any]]) -> str:
    nats, tokens = (sum(r[name] for r in records) for name in ("nll_sum", "num_tokens"))
    return f"{nats / tokens:.4f} nats per answer token"


def _heldout(loaded: Loaded, settings: Settings) -> Packed:
    assert loaded.tokenizer is not None
    source = settings.data or "stdlib"
    num = settings.num or _NUM
    data = load_data(DataConfig(source=source, num_heldout=num, seed=settings.seed))
    if not data.heldout:
        raise InputError(f"{source} holds too few examples to hold any out: give more")
    examples = encode_records(data.heldout, loaded.tokenizer)
    return pack(examples, settings.seq_len, loaded.tokenizer.pad_id, "truncate")
