"""The plots of contextual sparsity: what it costs, what is predicted, which units matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter

from moejax.report.plots import LINE_COLORS, MARKERS, _figure

# What a mask is chosen by: README has it for users.
METHODS = (
    "static",
    "predicted",
    "predicted_per_layer",
    "dejavu",
    "dejavu_equal",
    "oracle",
    "random",
)
# One colour and marker each, the same in every plot.
# Decide at every token.
PER_TOKEN = (
    *("dejavu_token", "dejavu_equal_token", "dejavu_token_single"),
    *("predicted_token", "predicted_each", "predicted_now", "predicted_late"),
)
WHEN = {
    "by the prompt": (*METHODS, "griffin", "griffin_single"),
    "at every token": ("static", "predicted", "oracle", "cats", "teal", *PER_TOKEN),
}
DRAWN = (*METHODS, "griffin_single", "griffin", "cats", "teal", *PER_TOKEN)


def _style(method: str) -> dict[str, Any]:
    at = DRAWN.index(method) if method in DRAWN else len(DRAWN)
    dashed = method in ("griffin", "griffin_single", "cats", "teal", *PER_TOKEN)
    return {
        "color": LINE_COLORS[at % len(LINE_COLORS)],
        "marker": MARKERS[at % len(MARKERS)],
        "linestyle": "--" if dashed else ":" if method in ("random", "dejavu_equal") else "-",
        "label": method.replace("_", " "),
        "markersize": 5,
    }


def quality_plot(
    points: Mapping[str, Sequence[tuple[float, float]]], dense: float, what: str, title: str
) -> Figure:
    """A figure of merit against sparsity, one line per method, the dense model as a level.

    points: method -> (sparsity, value). Perplexities are drawn on a log axis, cut at 30 times the
    dense one, so that a method that breaks does not flatten the others.
    """
    figure, axes = _figure(7.2, 4.4)
    is_perplexity = what.startswith("perplexity")
    most = 30 * dense if is_perplexity else float("inf")
    if any(v > most for line in points.values() for _, v in line):
        what = f"{what}, at most {most:.0f}"
    for method, line in points.items():
        values = [min(v, most) for _, v in line]
        axes.plot([s for s, _ in line], values, **_style(method))
    axes.axhline(dense, color="#777777", linewidth=1, label="dense")
    if is_perplexity:
        axes.set_yscale("log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("share of units pruned after the prompt, rounded down to whole ones")
    axes.set_ylabel(what)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def heldout_plot(per_layer: Mapping[str, Mapping[str, Sequence[float]]], part: str) -> Figure:
    """Per layer: Spearman's correlation with the truth, and the gain over the static mean.

    per_layer: predictor -> {"spearman": [...], "static_spearman": [...], "gain": [...]}.
    """
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    static = next(iter(per_layer.values()))["static_spearman"]
    left.plot(static, color="#777777", linewidth=2, label="static mean")
    for name, table in per_layer.items():
        style = _style(
            {
                "unified": "predicted",
                "per_layer_normalised": "predicted_per_layer",
                "token": "predicted_token",
            }.get(name, name)
        )
        left.plot(table["spearman"], **style)
        right.plot(table["gain"], **style)
    right.axhline(0, color="#777777", linewidth=1)
    left.set_ylabel("Spearman within the layer")
    right.set_ylabel("Spearman of the deviations from the mean text")
    left.set_title(f"{part}: how well units are ranked, held-out texts", fontsize=10)
    right.set_title("gain: what nothing fixed can give", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def maps_plot(
    maps: Mapping[str, Any], units: str, scaled: bool = True, first: int = 0
) -> Figure:
    """One heat map per name, layer x unit, each layer scaled to its range or shares as they are.

    first: the number of the first layer.
    """
    names = list(maps)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.6, 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    image: Any = None
    for axes, name in zip(grid.flat, names, strict=False):
        values = np.asarray(maps[name], np.float64)
        if scaled:
            low = values.min(1, keepdims=True)
            values = (values - low) / np.maximum(values.max(1, keepdims=True) - low, 1e-30)
        image = axes.imshow(
            values,
            aspect="auto",
            cmap="Blues",
            vmin=0,
            vmax=1,
            interpolation="none",
            extent=(-0.5, values.shape[1] - 0.5, first + len(values) - 0.5, first - 0.5),
        )
        axes.set_title(name, fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel(units, fontsize=9)
    figure.supylabel("layer", fontsize=9)
    figure.colorbar(
        image,
        ax=list(grid.flat),
        label="of the layer's range" if scaled else "share of rows",
        shrink=0.7,
    )
    return figure


def speed_plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """How many times faster than dense decoding, and the byte bound, against sparsity.

    rows: "model", "sparsity", "against_dense" (a ratio), "bound", "refresh_every", and maybe
    "decided" (when) and "method"; a line of each model and method.
    """
    figure, axes = _figure(6.8, 4.2)

    def name_of(row: Mapping[str, Any]) -> str:
        said = row.get("method", row.get("decided"))
        return f"{row['model']}, {said.replace('_', ' ')}" if said else row["model"]

    for at, name in enumerate(dict.fromkeys(name_of(row) for row in rows)):
        mine = sorted((r for r in rows if name_of(r) == name), key=lambda r: r["sparsity"])
        shares = [row["sparsity"] for row in mine]
        color = LINE_COLORS[at % len(LINE_COLORS)]
        ratios = [row["against_dense"] for row in mine]
        axes.plot(shares, ratios, color=color, marker=MARKERS[at % len(MARKERS)], label=name)
        bounds = [row["bound"] for row in mine]
        axes.plot(shares, bounds, color=color, linestyle=":", label=f"{name}, byte bound")
    axes.axhline(1, color="#777777", linewidth=1, label="dense")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("share of units not computed")
    axes.set_ylabel("dense time / sparse time")
    often = {row["refresh_every"] for row in rows}
    said = "masks by the prompt" if often == {0} else "predictor included"
    axes.set_title(f"Speed of decoding against sparsity, batch 1, {said}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
