"""ESFT's report: which experts tasks use, where they overlap, what their deltas take."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.report import esft_plots
from moejax.report.page import STYLE, _figure, _table


@dataclasses.dataclass(frozen=True)
class Task:
    """One task's relevance and choice.

    values_LJ: scores. layers, experts: their numbers. chosen: layer -> experts. num_bytes: of the
    chosen experts, None if the model's sizes are not known.
    """

    name: str
    values_LJ: np.ndarray
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    chosen: Mapping[int, Sequence[int]]
    num_bytes: int | None = None

    def best(self, layer: int, number: int) -> set[int]:
        """The layer's experts of highest score."""
        row = self.values_LJ[self.layers.index(layer)]
        return {self.experts[j] for j in np.argsort(-row, kind="stable")[:number]}

    @property
    def num_chosen(self) -> int:
        return sum(len(ids) for ids in self.chosen.values())


def overlap(tasks: Sequence[Task], number: int) -> np.ndarray:
    """How many of their `number` best experts two tasks share, mean over layers: [tasks, tasks]."""
    found = np.zeros((len(tasks), len(tasks)))
    for i, a in enumerate(tasks):
        for j, b in enumerate(tasks):
            shared = [len(a.best(n, number) & b.best(n, number)) for n in a.layers]
            found[i, j] = np.mean(shared)
    return found


def write(
    folder: Path,
    tasks: Sequence[Task],
    what: Mapping[str, Any],
    whole_bytes: int | None,
    groups: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Draws every plot, writes report.html, and returns the numbers for report.json.

    what: "score", "threshold" and "top_k", for the texts. groups: rows of
    `moejax.methods.expert_groups.group_sizes`.
    """
    score, top_k = what["score"], what["top_k"]
    shared = overlap(tasks, top_k)
    figures = {
        f"Relevance of each expert ({score} score)": (
            "relevance",
            esft_plots.relevance_plot(tasks, score),
        ),
        "Experts per layer": ("experts_per_layer", esft_plots.counts_plot(tasks)),
    }
    if len(tasks) > 1:
        names = [task.name for task in tasks]
        figures["Overlap of tasks"] = ("overlap", esft_plots.overlap_plot(names, shared, top_k))
    if whole_bytes is not None:
        figures["Bytes"] = ("bytes", esft_plots.bytes_plot(tasks, whole_bytes))
    if groups:
        figures["Group size"] = ("groups", esft_plots.group_plot(groups))
    paths = {}
    for title, (name, figure) in figures.items():
        paths[title] = folder / f"{name}.png"
        figure.savefig(paths[title], dpi=130)
    rows = [_row(task, whole_bytes) for task in tasks]
    text = (
        f"An expert is chosen where the {score} scores of a layer, highest first, reach "
        f"{what['threshold']:g}. Overlap counts the {top_k} best experts of each layer."
    )
    headers = ("task", "experts", "share", "per layer", "bytes", "of the model")
    parts = ["<h1>moejax: the experts that tasks use</h1>", _table(headers, rows)]
    parts += [f"<p>{html.escape(text)}</p>", *(_figure(t, p) for t, p in paths.items())]
    (folder / "report.html").write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>moejax ESFT</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    return {
        **what,
        "whole_bytes": whole_bytes,
        "overlap": shared.tolist(),
        "groups": list(groups),
        "tasks": [
            {
                "name": task.name,
                "experts": task.num_chosen,
                "bytes": task.num_bytes,
                "per_layer": {str(n): len(task.chosen.get(n, ())) for n in task.layers},
            }
            for task in tasks
        ],
    }


def _row(task: Task, whole_bytes: int | None) -> list[str]:
    counts = [len(task.chosen.get(n, ())) for n in task.layers]
    total = task.values_LJ.size
    size = "" if task.num_bytes is None else f"{task.num_bytes / 1e6:,.1f} MB"
    part = ""
    if whole_bytes and task.num_bytes is not None:
        part = f"{task.num_bytes / whole_bytes:.1%}"
    spread = f"{min(counts)} to {max(counts)}, mean {np.mean(counts):.1f}"
    return [task.name, str(sum(counts)), f"{sum(counts) / total:.1%}", spread, size, part]
