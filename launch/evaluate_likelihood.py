"""Multiple choice and perplexity: what a model thinks of given texts; nothing is generated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from launch.evaluate_keep import keeping, passed
from launch.evaluate_settings import (
    CLAIM,
    Outcome,
    Settings,
    about_overlap,
    compared,
    console,
    describe,
    load_model,
    overlap_of,
)
from moejax.core.errors import InputError
from moejax.data.sources import rows
from moejax.evals import choice
from moejax.evals.tasks.choice import CHOICE_TASKS, load_choices, with_shots
from moejax.evals.text_likelihood import Encoding
from moejax.io.load import Loaded
from moejax.serve.generate import context_length
from moejax.serve.likelihood import log_likelihoods
from moejax.train.loop import claim_folder

_BATCH_SIZE = 4


def evaluate(settings: Settings) -> Outcome | None:
    """Scores choices or texts and prints accuracy or perplexity; None for a dry run."""
    if settings.task == "perplexity":
        texts = _texts(settings)
        what = f"{len(texts)} texts, {sum(len(text) for _, text in texts):,} characters"
    else:
        items = _choices(settings)
        what = f"{len(items)} questions, {settings.shots} shots"
    shares = overlap_of(settings) if settings.task in CHOICE_TASKS else {}
    loaded = load_model(settings)
    if settings.dry_run:
        console.print(f"{settings.task}: {what}", markup=False)
        describe(loaded)
        return None
    asked: dict[str, Any] = {
        "task": settings.task,
        "model": settings.model,
        "data": settings.data or CHOICE_TASKS[settings.task].source,
        "num": settings.num,
        "shots": settings.shots,
        "seed": settings.seed,
        "batch_size": settings.batch_size or _BATCH_SIZE,
        "dtype": settings.dtype,
        "form": "text",
    }
    claim_folder(settings.out, asked, CLAIM)
    assert loaded.tokenizer is not None
    encoding = Encoding(loaded.tokenizer, context_length(loaded.config))
    score = _scorer(loaded, settings)
    if settings.task == "perplexity":
        total = sum(len(encoding.windows(text)) for _, text in texts)
        with keeping(settings, total, _perplexity) as (done, keep):
            records = choice.judge_texts(texts, encoding, score, done=done, on_records=keep)
    else:
        with keeping(settings, len(items), passed) as (done, keep):
            records = choice.judge_choices(items, encoding, score, done=done, on_records=keep)
    how = {name: asked[name] for name in ("model", "shots", "batch_size", "dtype")}
    records = [
        {"task": settings.task, "form": "text", "overlap": shares.get(record["id"])}
        | record
        | {"settings": how}
        for record in records
    ]
    if settings.task == "perplexity":
        result = choice.text_summary(records)
        console.print(
            f"perplexity {result['token_perplexity']:.4f} per token, "
            f"{result['word_perplexity']:.4f} per word, {result['bits_per_byte']:.4f} bits per "
            f"byte; {result['num_tokens']} tokens",
            markup=False,
        )
        return asked, records, result
    result = choice.choice_summary(records) | about_overlap(settings, shares, records)
    for name in ("acc", "acc_norm"):
        low, high = result[f"{name}_interval"]
        console.print(
            f"{name} {result[name]:.4f} [{low:.4f}, {high:.4f}], {len(records)} questions",
            markup=False,
        )
    result |= compared(settings, records)
    return asked, records, result


def _scorer(loaded: Loaded, settings: Settings):
    most = 512 * (settings.batch_size or _BATCH_SIZE)

    def score(pairs):
        return log_likelihoods(
            loaded.params,
            loaded.config,
            pairs,
            max_batch_tokens=most,
            options=settings.options,
        )

    return score


def _perplexity(records: list[dict[str, Any]]) -> str:
    nats, tokens = (sum(r[name] for r in records) for name in ("nll_sum", "num_tokens"))
    return f"perplexity {math.exp(nats / tokens):.4f}"


def _choices(settings: Settings):
    task = CHOICE_TASKS[settings.task]
    items = load_choices(task, settings.data, settings.num)
    if not settings.shots:
        return items
    source = settings.shots_data or (None if settings.data else task.shots)
    pool = load_choices(task, source) if source else load_choices(task, settings.data)
    return with_shots(items, pool, settings.shots, settings.seed)


def _texts(settings: Settings) -> list[tuple[str, str]]:
    """A .txt file is one text; of a JSONL file or hub set, each row's "text" or "page"."""
    source = settings.data
    if source is None:
        raise InputError("--task=perplexity needs --data: a .txt file, a .jsonl file or a hub set")
    if source.endswith(".txt"):
        if not Path(source).is_file():
            raise InputError(f"{source}: no such file")
        text = Path(source).read_text("utf-8", errors="replace")
        if not text.strip():
            raise InputError(f"{source} is empty")
        return [(source, text)]
    name, _, split = source.partition("#")
    texts = []
    for where, row in rows(name, split or "test"):
        found = row.get("text") if row.get("text") is not None else row.get("page")
        if not isinstance(found, str):
            raise InputError(f"{where}: the text field 'text' (or 'page') is missing")
        if found.strip():
            texts.append((where, found))
    if not texts:
        raise InputError(f"{name} holds no text")
    return texts[: settings.num]
