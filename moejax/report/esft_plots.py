"""Plots of ESFT: how soon scores settle, which experts tasks use, where they overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from moejax.report.plots import LINE_COLORS, MARKERS, _figure

LEAST_LOST = 1e-3  # nats, the least that the frontier's axis shows


def stability_plot(curves: Sequence[Any], top_k: int) -> Figure:
    """Overlap of two disjoint samples' best experts against their size, one line per score."""
    figure, axes = _figure(7.2, 4.0)
    for i, curve in enumerate(curves):
        color = LINE_COLORS[i % len(LINE_COLORS)]
        axes.plot(
            curve.sizes, curve.overlap, color=color, marker=MARKERS[i], label=f"{curve.score} score"
        )
        axes.fill_between(curve.sizes, curve.low, curve.high, color=color, alpha=0.15)
    level = curves[0].level
    axes.axhline(level, color="#777777", linestyle=":", label=f"stable: {level:.0%}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("tokens in each of two samples without a common sequence")
    axes.set_ylabel(f"share of the {top_k} best experts in common")
    axes.set_title("When the ranking of experts is stable (band: all draws)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def relevance_plot(tasks: Sequence[Any], score: str) -> Figure:
    """One heat map per task, layer x expert; a dot marks what is chosen."""
    num_layers, num_experts = tasks[0].values_LJ.shape
    width = min(12.0, 2.2 + 0.16 * num_experts)
    height = 1.2 + len(tasks) * (0.7 + 0.13 * num_layers)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(len(tasks), 1, squeeze=False, sharex=True)[:, 0]
    top = max(float(task.values_LJ.max()) for task in tasks)
    for axes, task in zip(grid, tasks, strict=True):
        image = axes.imshow(
            task.values_LJ, aspect="auto", cmap="Blues", vmin=0.0, vmax=top, interpolation="none"
        )
        column = {e: j for j, e in enumerate(task.experts)}
        marks = [(column[e], i) for i, n in enumerate(task.layers) for e in task.chosen.get(n, ())]
        axes.scatter(*zip(*marks, strict=True), s=9, color=LINE_COLORS[1], linewidths=0)
        step = max(1, num_layers // 10)
        axes.set_yticks(range(0, num_layers, step), [str(n) for n in task.layers[::step]])
        axes.set_ylabel("layer")
        axes.set_title(f"{task.name}: {len(marks)} experts chosen (dots)", fontsize=10)
    step = max(1, num_experts // 16)
    grid[-1].set_xticks(range(0, num_experts, step), [str(e) for e in tasks[0].experts[::step]])
    grid[-1].set_xlabel("expert")
    figure.colorbar(image, ax=list(grid), label=f"{score} score", aspect=30 * len(tasks))
    return figure


def overlap_plot(names: Sequence[str], shared: Any, top_k: int) -> Figure:
    """Matrix of how many of their best experts two tasks share."""
    size = 2.6 + 0.75 * len(names)
    figure, axes = _figure(size + 1.2, size)
    image = axes.imshow(shared, cmap="Blues", vmin=0.0, vmax=top_k)
    for i, row in enumerate(shared):
        for j, value in enumerate(row):
            color = "white" if value > 0.6 * top_k else "black"
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"Shared of the {top_k} best experts, mean over layers", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def counts_plot(tasks: Sequence[Any]) -> Figure:
    """How many experts each layer has chosen, one line per task."""
    figure, axes = _figure(7.2, 3.8)
    for i, task in enumerate(tasks):
        counts = [len(task.chosen.get(n, ())) for n in task.layers]
        color = LINE_COLORS[i % len(LINE_COLORS)]
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(task.layers, counts, color=color, marker=marker, markersize=4, label=task.name)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("experts chosen")
    axes.set_title(f"Experts per layer, of {tasks[0].values_LJ.shape[1]}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def bytes_plot(tasks: Sequence[Any], whole_bytes: int) -> Figure:
    """What each task's experts take beside the whole model."""
    rows = [("whole model", whole_bytes), *((t.name, t.num_bytes) for t in tasks)]
    figure, axes = _figure(7.2, 1.0 + 0.4 * len(rows))
    for y, (_, size) in enumerate(rows):
        color = "#777777" if y == 0 else LINE_COLORS[0]
        axes.barh(y, size / 1e6, color=color)
        text = f" {size / 1e6:,.1f} MB ({size / whole_bytes:.1%})"
        axes.text(size / 1e6, y, text, va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * whole_bytes / 1e6)
    axes.set_xlabel("megabytes on disk")
    axes.set_title("A task's experts beside the model")
    return figure


def group_plot(rows: Sequence[Any]) -> Figure:
    """Experts to train against group size, grouped by co-occurrence and at random."""
    figure, axes = _figure(6.4, 3.8)
    sizes = [str(row["size"]) for row in rows]
    for i, kind in enumerate(("co_occurrence", "random")):
        shares = [row[kind]["share"] for row in rows]
        label = f"grouped {'by co-occurrence' if i == 0 else 'at random'}"
        axes.plot(sizes, shares, color=LINE_COLORS[i], marker=MARKERS[i], label=label)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("experts per group")
    axes.set_ylabel("share of all experts to train")
    axes.set_title("What coarser experts cost")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def frontier_plot(
    changes: Mapping[str, Any], rates: Sequence[Any], base: Mapping[str, float], target: str
) -> Figure:
    """What was gained on the target against what the other domains lost, from the base on.

    changes: method -> its "target" and "others" minus the base's at its best rate, with intervals;
    rates: every method at every rate, lines of small dots from the lowest rate to the highest
    (launch/esft_study_report.py); base: the base's own losses. Losses of less than LEAST_LOST,
    which are noise, lie on the lower edge.
    """
    figure, axes = _figure(7.2, 5.0)
    for i, (method, change) in enumerate(changes.items()):
        color, marker = LINE_COLORS[i % len(LINE_COLORS)], MARKERS[i % len(MARKERS)]
        line = sorted((r for r in rates if r["method"] == method), key=lambda r: r["rate"])
        axes.plot(
            [base["target"] - r["test"]["target"] for r in line],
            [max(LEAST_LOST, r["test"]["others"] - base["others"]) for r in line],
            color=color, marker=".", markersize=5, linewidth=1.2, alpha=0.7,
        )
        mine, others = change["target"], change["others"]
        lost = max(LEAST_LOST, others["mean"])
        low, high = (max(LEAST_LOST, others[end]) for end in ("low", "high"))
        axes.errorbar(
            -mine["mean"], lost,
            xerr=[[mine["high"] - mine["mean"]], [mine["mean"] - mine["low"]]],
            yerr=[[lost - low], [high - lost]],
            color=color, marker=marker, linestyle="none", capsize=3, label=method,
        )
    axes.set_yscale("log")
    axes.set_xlabel(f"gained on {target}, nats per token (higher is better)")
    axes.set_ylabel("lost on the other domains, nats (lower is better)")
    axes.set_title("What is learned against what is forgotten (lines: learning rates)", fontsize=11)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure
