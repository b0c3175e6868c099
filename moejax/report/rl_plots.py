"""Curves of a reinforcement-learning run, from its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from moejax.report.plots import LINE_COLORS

PANELS = (
    ("reward", "mean reward"),
    ("kl", "KL to the start, nats per token"),
    ("entropy", "entropy estimate, nats per token"),
    ("length", "tokens per answer"),
    ("mixed_groups", "share of groups with both outcomes"),
    ("clipped", "share of tokens beyond the clip"),
)


def curves(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Reward, KL, entropy, length and what the updates did, over updates; solved held-out share
    beside the reward where it was evaluated."""
    shown = [(key, title) for key, title in PANELS if any(key in r for r in records)]
    figure = Figure(figsize=(9.6, 2.6 * -(-len(shown) // 2)), layout="constrained")
    grid = figure.subplots(-(-len(shown) // 2), 2, squeeze=False).flat
    for index, (axes, (key, title)) in enumerate(zip(grid, shown, strict=False)):
        points = [(r["step"], r[key]) for r in records if key in r]
        axes.plot(*zip(*points, strict=True), color=LINE_COLORS[index], marker="o", markersize=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
        evals = [(r["step"], r["eval/solved"]) for r in records if "eval/solved" in r]
        if key == "reward" and evals:
            style = {"color": "black", "marker": "s", "markersize": 4, "linestyle": "--"}
            axes.plot(*zip(*evals, strict=True), label="held out, greedy", **style)
            axes.legend(frameon=False, fontsize=8)
    for axes in list(grid)[len(shown) :]:
        axes.set_visible(False)
    return figure
