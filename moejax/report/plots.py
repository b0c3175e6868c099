"""The plots of a report, one PNG each; what a report has no data for is left out.

Figures are made without pyplot: nothing global, no window, no backend to choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from moejax.report.schema import Report

# Told apart also by people who do not see red and green alike (Okabe and Ito's palette).
COLORS = {
    "base": "#777777",
    "sft_dense": "#0072B2",
    "moe": "#D55E00",
    "merge": "#009E73",
    "merged_uniform": "#CC79A7",
    "merged_learned": "#009E73",
    "shared_only": "#E69F00",
}
MARKERS = "osD^vPX*"
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DPI = 130


def draw(report: Report, folder: Path) -> dict[str, Path]:
    """Writes every plot the report has data for; returns {title: path} in reading order."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, tuple[str, Figure]] = {
        "Held-out loss": ("nll", intervals_plot(report, "nll")),
    }
    if any(row["pass_at_1"] is not None for row in report["rows"]):
        figures["Function tasks solved"] = ("pass_at_1", intervals_plot(report, "pass_at_1"))
    if report.get("curves"):
        figures["Training"] = ("training", curves_plot(report["curves"]))
    if report.get("coefficients"):
        figures["Learned merge"] = ("coefficients", coefficients_plot(report["coefficients"]))
    if report.get("expert_load"):
        figures["Expert load"] = ("expert_load", load_plot(report["expert_load"]))
    paths = {}
    for title, (name, figure) in figures.items():
        paths[title] = folder / f"{name}.png"
        figure.savefig(paths[title], dpi=DPI)
    return paths


def intervals_plot(report: Report, metric: str) -> Figure:
    """One row per model: the value with its interval; a dotted line at the base model's value."""
    rows = [row for row in report["rows"] if row[metric] is not None]
    figure, axes = _figure(7.2, 0.9 + 0.42 * len(rows))
    for y, row in enumerate(rows):
        low, high = row[f"{metric}_interval"]
        color = COLORS.get(row["model"], "#444444")
        axes.plot([low, high], [y, y], color=color, linewidth=2.5, solid_capstyle="round")
        axes.plot(row[metric], y, "o", color=color, markersize=8)
        text = f"{row[metric]:.4f}" if metric == "nll" else f"{row[metric]:.0%}"
        axes.annotate(
            text,
            (row[metric], y),
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "linewidth": 0},
        )
    if rows and rows[0]["model"] == "base":
        axes.axvline(rows[0][metric], color=COLORS["base"], linestyle=":", zorder=0)
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.grid(axis="x", alpha=0.3)
    if metric == "nll":
        tokens = f"{rows[0]['nll_tokens']:,}"
        axes.set_xlabel(f"nats per answer token, {tokens} held-out tokens (lower is better)")
        axes.set_title("Held-out loss with 95% intervals over examples")
    else:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlim(-0.03, 1.03)
        tasks = rows[0]["pass_at_1_n"]
        axes.set_xlabel(f"share of {tasks} function tasks passed, one answer each (more is better)")
        axes.set_title("pass@1 with 95% Wilson intervals")
    return figure


def curves_plot(curves: dict[str, Sequence[dict[str, float]]]) -> Figure:
    """Training loss against tokens trained on, one line per stage."""
    figure, axes = _figure(7.2, 4.0)
    for i, (name, points) in enumerate(curves.items()):
        axes.plot(
            [point["tokens"] for point in points],
            [point["loss"] for point in points],
            color=COLORS.get(name, LINE_COLORS[i % len(LINE_COLORS)]),
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            label=name,
        )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.set_xlabel("tokens trained on since the base model")
    axes.set_ylabel("loss, nats per answer token")
    axes.set_title("Training loss (of each step's own batch)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def coefficients_plot(coefficients: dict[str, Any]) -> Figure:
    """The routed experts' coefficients per layer, and the uniform value they start from."""
    routed = coefficients["routed"]
    panels = routed if isinstance(routed, dict) else {"": routed}
    figure = Figure(figsize=(7.2, 1.2 + 2.8 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    lam = np.asarray(coefficients["lam"], float)
    for axes, (matrix, table) in zip(grid, panels.items(), strict=True):
        values_LJ = np.asarray(table, float)
        _coefficient_lines(axes, values_LJ)
        axes.set_ylabel(f"{matrix} coefficient".strip())
    shared = f"{lam[0]:g}" if np.ptp(lam) == 0 else f"{lam.min():.3f} to {lam.max():.3f}"
    grid[0].set_title(f"Learned coefficients of the routed experts (shared expert: {shared})")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    grid[-1].set_xlabel("layer")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def load_plot(load: Sequence[Sequence[float]]) -> Figure:
    """Heat map, layer x routed expert: tokens an expert got, 1 = what an even split gives."""
    load_LJ = np.asarray(load, float)
    relative_LJ = load_LJ / np.maximum(load_LJ.mean(axis=1, keepdims=True), 1e-9)
    num_layers, num_routed = relative_LJ.shape
    figure, axes = _figure(2.6 + 0.62 * num_routed, 1.4 + 0.2 * num_layers)
    top = max(2.0, float(relative_LJ.max()))
    image = axes.imshow(
        relative_LJ, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1.0, vmin=0.0, vmax=top)
    )
    for layer, row in enumerate(relative_LJ):
        for expert, value in enumerate(row):
            color = "black" if 0.35 < value < 1 + 0.65 * (top - 1) else "white"
            axes.text(
                expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color
            )
    axes.set_xticks(range(num_routed), [str(j + 1) for j in range(num_routed)])
    axes.set_yticks(range(0, num_layers, max(1, num_layers // 15)))
    axes.set_xlabel("routed expert")
    axes.set_ylabel("layer")
    axes.set_title("Expert load while training")
    figure.colorbar(image, ax=axes, label="tokens, relative to an even split")
    return figure


def _coefficient_lines(axes: Axes, values_LJ: np.ndarray) -> None:
    num_routed = values_LJ.shape[1]
    uniform = 1 / num_routed
    for j in range(num_routed):
        axes.plot(
            values_LJ[:, j],
            color=LINE_COLORS[j % len(LINE_COLORS)],
            marker=MARKERS[j % len(MARKERS)],
            markersize=4,
            linewidth=1.2,
            label=f"expert {j + 1}",
        )
    axes.axhline(uniform, color="black", linestyle=":", label=f"uniform, {uniform:.3f}")
    # Noise around uniform must not be drawn as if it were a large effect.
    reach = max(0.1 * uniform, 1.1 * float(np.abs(values_LJ - uniform).max()))
    axes.set_ylim(uniform - reach, uniform + reach)
    axes.grid(alpha=0.3)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
