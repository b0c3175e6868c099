"""What the study of LLM Modules says: share of the gap closed, the leak; table, JSON, plots."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from moejax.core.errors import InputError
from moejax.evals import bootstrap
from moejax.io import atomic
from moejax.report import graft_plots

Scores = Mapping[str, Sequence[float]]


def write_report(config: ConfigDict, workdir: Path, say) -> None:
    """table.csv, study.json and plots/ from the raw results that are there; prints the table."""
    path = workdir / "before.json"
    if not path.is_file():
        raise InputError(f"{path} is missing: run the study first")
    before = atomic.read_json(path)
    arms: dict[str, list[dict[str, Any]]] = {}
    for arm in (*config.arms, *config.once):
        files = [workdir / "arms" / arm / f"seed_{seed}" / "result.json" for seed in config.seeds]
        found = [atomic.read_json(f) for f in files if f.is_file()]
        if found:
            arms[arm] = found
    if "adapter" not in arms:
        raise InputError(f"{workdir} has no finished adapter arm yet: the gap starts there")
    rows = [_row("source alone", [before["source"]], None, before, arms)]
    rows += [
        _row(f"{name} as it came", [before[key]], None, before, arms)
        for key, name in (("target", "target"), ("own_target", "own target"))
        if key in before
    ]
    for arm, results in arms.items():
        for view in ("scores", "causal", "free"):
            if view in results[0]:
                name = arm if view == "scores" else f"{arm}, {view}"
                if view == "scores" and arm == "paper":
                    name = "paper, unmasked"
                scores = [r[view] for r in results]
                rows.append(_row(name, scores, results[0]["trained_params"], before, arms))
    with (workdir / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    seconds = {arm: [round(r["train_s"]) for r in results] for arm, results in arms.items()}
    study = {
        "rows": rows,
        "source_tokens": before["source_tokens"],
        "cache_s": before["cache_s"],
        "source_all_ids": sum(before["source_all"]["bits"]) / sum(before["source_all"]["bytes"]),
        "train_s": seconds,
        "differences": _differences(arms),
    }
    atomic.write_json(workdir / "study.json", study)
    (workdir / "plots").mkdir(exist_ok=True)
    graft_plots.study_plot(rows).savefig(workdir / "plots" / "study.png", dpi=130)
    say(f"source, all of its ids possible: {study['source_all_ids']:.4f} bits per byte")
    for line in lines(rows, study["differences"]):
        say(line)
    say(f"written  {workdir}/table.csv, study.json, plots/study.png")


def _row(name, scores: Sequence[Scores], params, before, arms) -> dict[str, Any]:
    """One line: intervals over texts, of the mean over seeds."""
    bits, size = _mean(scores, "bits"), _mean(scores, "bytes")
    right, words = _mean(scores, "right"), _mean(scores, "words")
    value, first = bootstrap.ratio(bits, size), bootstrap.ratio(right, words)
    each = [sum(s["bits"]) / sum(s["bytes"]) for s in scores]
    row: dict[str, Any] = {"arm": name, "seeds": len(scores), "trained_params": params or ""}
    row |= {"bits_per_byte": value.mean, "low": value.low, "high": value.high}
    row |= {"seed_low": min(each), "seed_high": max(each)}
    row |= {"first_word": first.mean, "first_word_low": first.low, "first_word_high": first.high}
    share = _closed(name, (bits, size), before, arms)
    row |= {"gap_closed": "", "gap_low": "", "gap_high": ""}
    if share is not None:
        row |= {"gap_closed": share.mean, "gap_low": share.low, "gap_high": share.high}
    return row


def _closed(name: str, mine, before, arms) -> bootstrap.Interval | None:
    """(adapter - arm) / (adapter - source) in bits per byte; texts are drawn together.

    None for the free view, whose texts are a few words, and where the gap has no adapter arm.
    """
    own = name.startswith("own")
    base = arms.get("own_adapter" if own else "adapter")
    if name.endswith("free") or not base:
        return None
    adapter = [r["scores"] for r in base]
    parts = ((_mean(adapter, "bits"), _mean(adapter, "bytes")), mine,
             (np.array(before["source"]["bits"]), np.array(before["source"]["bytes"])))
    columns = np.stack([x for pair in parts for x in pair], axis=1)

    def share(means: np.ndarray) -> np.ndarray:
        a, b, c = (means[..., 2 * i] / means[..., 2 * i + 1] for i in range(3))
        return (a - b) / np.where(a == c, np.nan, a - c)

    low, high = bootstrap.of_means(columns, share)
    return bootstrap.Interval(float(share(columns.mean(0))), low, high)


def _differences(arms) -> dict[str, dict[str, Any]]:
    """Paired, in bits per byte: the bridge against each, and the paper's mask alone."""
    pairs = [("bridge", arm) for arm in arms if arm not in ("bridge", "own_bridge", "own_adapter")]
    pairs += [("own_bridge", "own_adapter"), ("paper", "paper_causal")]
    found = {}
    for a, b in pairs:
        if a in arms and b in arms:
            views = [("scores", "scores")] if a != "paper" else [(v, v) for v in (
                "scores", "causal", "free")]
            for left, right in views:
                one, two = ([r[v] for r in arms[x]] for x, v in ((a, left), (b, right)))
                gap = bootstrap.paired_ratio(
                    _mean(one, "bits"), _mean(two, "bits"), _mean(one, "bytes")
                )
                word = bootstrap.verdict(gap, lower_is_better=True)
                name = f"{a} - {b}" + ("" if left == "scores" else f", {left}")
                found[name] = {"bits_per_byte": gap.mean, "low": gap.low, "high": gap.high,
                               "verdict": word}
    return found


def _mean(scores: Sequence[Scores], name: str) -> np.ndarray:
    return np.mean([s[name] for s in scores], axis=0)


def lines(rows: Sequence[Mapping[str, Any]], differences) -> list[str]:
    """The table as markdown."""
    found = ["| arm | seeds | trained | bits per byte | gap closed | first words |",
             "|---|---|---|---|---|---|"]
    for r in rows:
        share = "" if r["gap_closed"] == "" else (
            f"{r['gap_closed']:.1%} [{r['gap_low']:.1%}, {r['gap_high']:.1%}]"
        )
        params = f"{r['trained_params']:,}" if r["trained_params"] else ""
        found.append(
            f"| {r['arm']} | {r['seeds']} | {params} | {r['bits_per_byte']:.4f} "
            f"[{r['low']:.4f}, {r['high']:.4f}] | {share} | {r['first_word']:.1%} "
            f"[{r['first_word_low']:.1%}, {r['first_word_high']:.1%}] |"
        )
    found += ["", "| difference, bits per byte | | |", "|---|---|---|"]
    for name, d in differences.items():
        found.append(
            f"| {name} | {d['bits_per_byte']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}] "
            f"| {d['verdict']} |"
        )
    return found
