"""Plots of ESFT: how soon scores settle, which experts tasks use, where they overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from moejax.report.plots import LINE_COLORS, MARKERS, _figure


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
