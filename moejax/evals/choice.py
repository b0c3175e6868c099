"""Scores of multiple choice, and perplexity, from a model's log-likelihoods.

Questions and texts are scored some at a time, the same ones together in every run, so that a run
that was stopped and goes on gives the bits of one that was not.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from moejax.evals import bootstrap
from moejax.evals.tasks.choice import DELIMITER, ChoiceItem
from moejax.evals.text_likelihood import Encoding, LikelihoodFn, Pair

Record = dict[str, Any]


# Tokens that are scored between two reports, texts of similar length together.
CHUNK_TOKENS = 8192

OnRecords = Callable[[list[Record]], None]


def judge_choices(
    items: Sequence[ChoiceItem],
    encoding: Encoding,
    likelihoods: LikelihoodFn,
    *,
    done: Iterable[Record] = (),
    on_records: OnRecords | None = None,
) -> list[Record]:
    """One record per question: ln p of each choice, the best one, plain and per character.

    "margin" is by how many nats the best choice leads the second.

    Args:
      done: records of an earlier run; a chunk of questions that are all there is not scored again.
      on_records: called with each chunk's records.
    """
    pairs = [
        [
            encoding.pair(context, DELIMITER + continuation)
            for context, continuation in zip(item.contexts, item.continuations, strict=True)
        ]
        for item in items
    ]
    known = {record["id"]: record for record in done}
    records: list[Record] = []
    for part in _chunks([_num_tokens(of) for of in pairs]):
        if all(items[i].id in known for i in part):
            new = [known[items[i].id] for i in part]
        else:
            began = time.perf_counter()
            found = iter(likelihoods([pair for i in part for pair in pairs[i]]))
            seconds = round((time.perf_counter() - began) / len(part), 4)
            new = [
                _judged(items[i], np.array([next(found).log_prob for _ in pairs[i]]))
                | {"score_s": seconds}
                for i in part
            ]
        records += new
        if on_records is not None:
            on_records(new)
    return records


def _judged(item: ChoiceItem, scores: np.ndarray) -> Record:
    lengths = np.array([len(text) for text in item.continuations], np.float64)
    best, normed = int(scores.argmax()), int((scores / lengths).argmax())
    first, second = np.sort(scores)[::-1][:2]
    passed = best == item.gold
    return {
        "id": item.id,
        "sample": 0,
        "prompt": item.contexts[item.gold],
        "choices": list(item.continuations),
        "log_probs": scores.tolist(),
        "completion": item.continuations[best],
        "extracted": best,
        "gold": item.gold,
        "passed": passed,
        "passed_norm": normed == item.gold,
        "verdict": "pass" if passed else "wrong",
        "reason": "" if passed else f"choice {best}, not {item.gold}",
        "margin": float(first - second),
        "seed": None,
    }


def _num_tokens(pairs: Sequence[Pair]) -> int:
    return sum(len(before) + len(after) for before, after in pairs)


def _chunks(sizes: Sequence[int]) -> list[range]:
    """Neighbours whose sizes add up to CHUNK_TOKENS at most; what is larger stands alone."""
    chunks, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > CHUNK_TOKENS:
            chunks.append(range(start, i))
            start, total = i, 0
        total += size
    return [*chunks, range(start, len(sizes))] if sizes else []


def choice_summary(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy, plain and length-normalised, with Wilson's intervals."""
    result: dict[str, Any] = {"num_answers": len(records)}
    for name, field in (("acc", "passed"), ("acc_norm", "passed_norm")):
        share = bootstrap.wilson(sum(record[field] for record in records), len(records))
        result[name] = share.mean
        result[f"{name}_interval"] = [share.low, share.high]
    return result | {"verdicts": dict(Counter(record["verdict"] for record in records))}


def judge_texts(
    texts: Sequence[tuple[str, str]],
    encoding: Encoding,
    likelihoods: LikelihoodFn,
    *,
    done: Iterable[Record] = (),
    on_records: OnRecords | None = None,
) -> list[Record]:
    """One record per (id, text): its nats, tokens, words and bytes.

    Args:
      done: records of an earlier run: of windows ("sample" is a window's number), as `on_records`
        got them, or of whole texts ("num_words" is there).
      on_records: called with the records of each chunk of windows.
    """
    whole = {record["id"]: record for record in done if "num_words" in record}
    known = {(r["id"], r["sample"]): r for r in done if "num_words" not in r}
    left = [(name, text) for name, text in texts if name not in whole]
    windows = [
        (name, number, pair)
        for name, text in left
        for number, pair in enumerate(encoding.windows(text))
    ]
    parts: dict[str, list[Record]] = {name: [] for name, _ in left}
    for chunk in _chunks([_num_tokens([pair]) for *_, pair in windows]):
        asked = [windows[i] for i in chunk]
        if all((name, number) in known for name, number, _ in asked):
            new = [known[name, number] for name, number, _ in asked]
        else:
            found = likelihoods([pair for *_, pair in asked])
            new = [
                {
                    "id": name,
                    "sample": number,
                    "nll_sum": -one.log_prob,
                    "num_tokens": len(pair[1]),
                }
                for (name, number, pair), one in zip(asked, found, strict=True)
            ]
        for record in new:
            parts[record["id"]].append(record)
        if on_records is not None:
            on_records(new)
    return [whole.get(name) or _text_record(name, text, parts[name]) for name, text in texts]


def _text_record(name: str, text: str, parts: Sequence[Record]) -> Record:
    return {
        "id": name,
        "sample": 0,
        "nll_sum": math.fsum(part["nll_sum"] for part in parts),
        "num_tokens": sum(part["num_tokens"] for part in parts),
        "num_words": len(re.split(r"\s+", text)),
        "num_bytes": len(text.encode("utf-8", "surrogatepass")),
    }


def text_summary(records: Sequence[Record]) -> dict[str, Any]:
    """Perplexity per token, word and byte: exp(sum of nats / sum of units), and bits per byte."""
    nats = np.array([record["nll_sum"] for record in records])
    result: dict[str, Any] = {"num_texts": len(records)}
    for unit in ("token", "word", "byte"):
        counts = np.array([record[f"num_{unit}s"] for record in records], np.float64)
        interval = bootstrap.ratio(nats, counts)
        result[f"num_{unit}s"] = int(counts.sum())
        result[f"{unit}_perplexity"] = math.exp(interval.mean)
        if len(records) > 1:
            bounds = [math.exp(interval.low), math.exp(interval.high)]
            result[f"{unit}_perplexity_interval"] = bounds
    result["bits_per_byte"] = float(nats.sum() / result["num_bytes"] / math.log(2))
    return result
