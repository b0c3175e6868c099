"""The plots of a bridge: what it is worth, how far its gates open, where it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moejax.report.plots import LINE_COLORS


def arms_plot(arms: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bits per byte of every arm with its interval (lower is better)."""
    figure = Figure(figsize=(6.8, 1.2 + 0.4 * len(arms)), layout="constrained")
    axes = figure.subplots()
    for row, found in enumerate(arms.values()):
        value = found["bits_per_byte"]
        error = [[value - found["low"]], [found["high"] - value]]
        axes.errorbar(value, row, xerr=error, marker="o", capsize=3, color=LINE_COLORS[row % 7])
        axes.annotate(
            f"{value:.3f}",
            (value, row),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(arms)), list(arms))
    axes.set_ylim(len(arms) - 0.5, -0.7)
    axes.set_xlabel("bits per byte of held-out answers, 95% intervals (lower is better)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def study_plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Bits per byte and first words of every arm of a study, side by side."""
    figure = Figure(figsize=(11.0, 1.2 + 0.36 * len(rows)), layout="constrained")
    columns = figure.subplots(1, 2, sharey=True)
    kinds = (
        ("bits_per_byte", "low", "high", "bits per byte (lower is better)"),
        ("first_word", "first_word_low", "first_word_high", "share of first words right"),
    )
    for axes, (key, low, high, label) in zip(columns, kinds, strict=True):
        for number, row in enumerate(rows):
            value = row[key]
            error = [[max(0.0, value - row[low])], [max(0.0, row[high] - value)]]
            color = LINE_COLORS[number % 7]
            axes.errorbar(value, number, xerr=error, marker="o", capsize=3, color=color)
        axes.set_xlabel(f"{label}, 95% over texts")
        axes.grid(axis="x", alpha=0.3)
    columns[0].set_yticks(range(len(rows)), [row["arm"] for row in rows])
    columns[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def gates_plot(gates_MT: np.ndarray, words: Sequence[str]) -> Figure:
    """Heat map, layer of the bridge x token: the mean size of the gate."""
    num_layers, num_tokens = gates_MT.shape
    shown = min(num_tokens, 64)
    size = (min(14.0, 2.5 + 0.2 * shown), 2.0 + 0.35 * num_layers)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(gates_MT[:, :shown], aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(num_layers))
    axes.set_ylabel("layer of the bridge")
    axes.set_xticks(range(shown), [_plain(w) for w in words[:shown]], rotation=90, fontsize=7)
    axes.set_title("Mean size of the gate, first tokens of a text")
    figure.colorbar(image, ax=axes)
    return figure


def attention_plot(
    weights_TS: np.ndarray, words: Sequence[str], source_words: Sequence[str], layer: int
) -> Figure:
    """Where target tokens look in the source's text, mean over heads."""
    rows, columns = min(len(words), 48), min(len(source_words), 48)
    figure = Figure(figsize=(2.0 + 0.18 * columns, 1.6 + 0.18 * rows), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(weights_TS[:rows, :columns], aspect="auto", cmap="magma", vmin=0, vmax=1)
    axes.set_xticks(
        range(columns), [_plain(w) for w in source_words[:columns]], rotation=90, fontsize=7
    )
    axes.set_yticks(range(rows), [_plain(w) for w in words[:rows]], fontsize=7)
    axes.set_xlabel("source tokens")
    axes.set_ylabel("target tokens")
    axes.set_title(f"Cross-attention, layer {layer} of the bridge")
    figure.colorbar(image, ax=axes)
    return figure


def layers_plot(left_out: Mapping[str, float]) -> Figure:
    """Loss of a text with each layer of the bridge left out; the line: with all of them."""
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    names = [name for name in left_out if name != "none"]
    axes.bar(names, [left_out[n] - left_out["none"] for n in names], color=LINE_COLORS[0])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("layer of the bridge left out")
    axes.set_ylabel("change of the loss, nats per token")
    axes.set_title(f"One text, {left_out['none']:.3f} nats per token with all layers")
    return figure


def _plain(word: str) -> str:
    return word.replace("\n", "\\n").replace("$", r"\$").strip()[:12]
