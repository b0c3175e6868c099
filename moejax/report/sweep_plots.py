"""The plots of a sweep over interpolations and decodings, from `moejax.evals.sweep.rows_of`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moejax.report.plots import LINE_COLORS, MARKERS

Rows = Sequence[Mapping[str, Any]]


def against_delta(rows: Rows, measure: str, ks: Sequence[int], title: str) -> Figure:
    """A measure at each k against delta, one early checkpoint and one sampling, with intervals."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, k in enumerate(ks):
        found = sorted(
            (row for row in rows if row["measure"] == measure and row["k"] == k),
            key=lambda row: row["delta"],
        )
        if not found:
            continue
        deltas = [row["delta"] for row in found]
        color = LINE_COLORS[i % len(LINE_COLORS)]
        values = [row["value"] for row in found]
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(deltas, values, color=color, marker=marker, markersize=4, label=f"k = {k}")
        axes.fill_between(
            deltas,
            [row["low"] for row in found],
            [row["high"] for row in found],
            color=color,
            alpha=0.15,
            linewidth=0,
        )
    axes.set_xlabel("delta, the share of the early checkpoint (0 is the late one)")
    _percent(axes, f"{measure}@k")
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=9)
    return figure


def along_training(
    points: Mapping[str, Rows], k: int, alone: Mapping[str, Rows] | None = None
) -> Figure:
    """Pass@k against Pass@1, a line per kind of model in the order of its points.

    points: {kind: rows}, each row with label, pass1 and passk as (value, low, high).
    alone: kinds without a line between their points.
    """
    figure = Figure(figsize=(6.4, 5.0), layout="constrained")
    axes = figure.subplots()
    for i, (kind, rows) in enumerate({**points, **(alone or {})}.items()):
        color, marker = LINE_COLORS[i % len(LINE_COLORS)], MARKERS[i % len(MARKERS)]
        x = np.array([row["pass1"] for row in rows])
        y = np.array([row["passk"] for row in rows])
        axes.errorbar(
            x[:, 0],
            y[:, 0],
            xerr=_errors(x),
            yerr=_errors(y),
            color=color,
            marker=marker,
            markersize=5,
            linewidth=1.2 if kind in points else 0,
            elinewidth=0.6,
            label=kind,
        )
        for row, px, py in zip(rows, x[:, 0], y[:, 0], strict=True):
            axes.annotate(
                row["label"], (px, py), fontsize=7, xytext=(4, 4), textcoords="offset points"
            )
    _percent(axes, f"pass@{k}")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("pass@1")
    axes.set_title(f"Pass@{k} against Pass@1")
    axes.legend(frameon=False, fontsize=9)
    return figure


def pass_histogram(shares: Mapping[str, np.ndarray]) -> Figure:
    """How problems spread over Pass@1, one outline per arm: at both ends when diversity is gone."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(0, 1, 17)
    for i, (label, p) in enumerate(shares.items()):
        counts, _ = np.histogram(p, edges)
        color = LINE_COLORS[i % len(LINE_COLORS)]
        axes.stairs(counts / len(p), edges, color=color, label=label, linewidth=1.6)
    axes.set_xlabel("share of a problem's samples that are right")
    _percent(axes, "share of problems")
    axes.set_title("Histogram of per-problem Pass@1")
    axes.legend(frameon=False, fontsize=9)
    return figure


def bias_variance(rows: Rows, k: int) -> Figure:
    """Arms by bias 1 - E[p] and variance of Pass@1, over the lines of an equal bound on Pass@k.

    The bound is 1 - (bias^2 + variance)^(k/2); an arm's own Pass@k stands beside its mark, and may
    pass the line it lies on, since both moments are estimates.
    """
    figure = Figure(figsize=(6.8, 5.0), layout="constrained")
    axes = figure.subplots()
    arms: dict[str, dict[tuple[str, int], Any]] = {}
    for row in rows:
        arms.setdefault(row["arm"], {})[row["measure"], row["k"]] = row
    for i, (label, found) in enumerate(arms.items()):
        bias, variance = found.get(("bias", 0)), found.get(("variance", 0))
        if bias is None or variance is None:
            continue
        marker = MARKERS[i // len(LINE_COLORS) % len(MARKERS)]
        axes.errorbar(
            bias["value"],
            variance["value"],
            xerr=[[bias["value"] - bias["low"]], [bias["high"] - bias["value"]]],
            yerr=[[variance["value"] - variance["low"]], [variance["high"] - variance["value"]]],
            color=LINE_COLORS[i % len(LINE_COLORS)],
            marker=marker,
            linestyle="none",
            elinewidth=0.6,
            label=f"{label}: {found['pass', k]['value']:.3f}",
        )
    _bound_lines(axes, k)
    axes.set_xlabel("bias, 1 - mean of Pass@1")
    axes.set_ylabel("variance of Pass@1 over problems")
    axes.set_title(f"Bias and variance; lines: equal bound on Pass@{k}")
    figure.legend(title=f"arm: Pass@{k}", loc="outside right upper", frameon=False, fontsize=7)
    return figure


def _bound_lines(axes: Axes, k: int) -> None:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    bottom = min(bottom, 0.0)
    bias, variance = np.meshgrid(np.linspace(left, right, 80), np.linspace(bottom, top, 80))
    bound = 1 - np.maximum(bias**2 + variance, 0) ** (k / 2)
    if np.ptp(bound) > 1e-6:
        lines = axes.contour(bias, variance, bound, levels=8, colors="#999999", linewidths=0.7)
        axes.clabel(lines, fontsize=7, fmt="%.3g")
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def _errors(values: np.ndarray) -> np.ndarray:
    """[value, low, high] per point -> [2, points] of distances."""
    return np.maximum(np.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]]), 0)


def _percent(axes: Axes, label: str) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
