"""Scores of multiple choice, and perplexity, from a model's log-likelihoods."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.evals import bootstrap
from moejax.evals.tasks.choice import DELIMITER, ChoiceItem
from moejax.evals.text_likelihood import Encoding, LikelihoodFn

Record = dict[str, Any]


def judge_choices(
    items: Sequence[ChoiceItem], encoding: Encoding, likelihoods: LikelihoodFn
) -> list[Record]:
    """One record per question: ln p of each choice, the best one, plain and per character.

    "margin" is by how many nats the best choice leads the second.
    """
    texts = [
        (context, DELIMITER + continuation)
        for item in items
        for context, continuation in zip(item.contexts, item.continuations, strict=True)
    ]
    found = iter(likelihoods([encoding.pair(*text) for text in texts]))
    records = []
    for item in items:
        scores = np.array([next(found).log_prob for _ in item.continuations])
        lengths = np.array([len(text) for text in item.continuations], np.float64)
        best, normed = int(scores.argmax()), int((scores / lengths).argmax())
        first, second = np.sort(scores)[::-1][:2]
        passed = best == item.gold
        records.append(
            {
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
        )
    return records


def choice_summary(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy, plain and length-normalised, with Wilson's intervals."""
    result: dict[str, Any] = {"num_answers": len(records)}
    for name, field in (("acc", "passed"), ("acc_norm", "passed_norm")):
        share = bootstrap.wilson(sum(record[field] for record in records), len(records))
        result[name] = share.mean
        result[f"{name}_interval"] = [share.low, share.high]
    return result | {"verdicts": dict(Counter(record["verdict"] for record in records))}


def judge_texts(
    texts: Sequence[tuple[str, str]], encoding: Encoding, likelihoods: LikelihoodFn
) -> list[Record]:
    """One record per (id, text): its nats, tokens, words and bytes."""
    windows = [encoding.windows(text) for _, text in texts]
    found = iter(likelihoods([pair for pairs in windows for pair in pairs]))
    records = []
    for (name, text), pairs in zip(texts, windows, strict=True):
        records.append(
            {
                "id": name,
                "sample": 0,
                "nll_sum": -math.fsum(next(found).log_prob for _ in pairs),
                "num_tokens": sum(len(after) for _, after in pairs),
                "num_words": len(re.split(r"\s+", text)),
                "num_bytes": len(text.encode("utf-8", "surrogatepass")),
            }
        )
    return records


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
