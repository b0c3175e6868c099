"""A report as text: for the terminal, as Markdown for a README, rows as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moejax.report.schema import NO_GAIN, Report

WIDTH = 118
HEADERS = (
    "model",
    "nll",
    "95% interval",
    "pass@1",
    "95% interval",
    "params",
    "active",
    "tokens",
    "FLOPs",
    "time",
)
DIFFERENCE_HEADERS = ("difference", "nll", "95% interval", "", "pass@1", "95% interval", "")


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as CSV text, the keys as its first line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def render(report: Report, *, color: bool = False) -> str:
    """The rows and the paired differences as text, WIDTH columns wide, without a last newline."""
    rows, differences = _table(HEADERS), _table(DIFFERENCE_HEADERS)
    for cells in row_cells(report):
        rows.add_row(*cells)
    for cells in difference_cells(report):
        differences.add_row(*(_mark(text) if color else text for text in cells))
    text = io.StringIO()
    console = Console(
        file=text, width=WIDTH, force_terminal=color, no_color=not color, highlight=False
    )
    console.print(rows)
    console.print(differences)
    console.print(caption(report), soft_wrap=True)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def markdown(report: Report) -> str:
    """The same two tables in Markdown."""
    parts = [
        _markdown_table(HEADERS, row_cells(report)),
        _markdown_table(DIFFERENCE_HEADERS, difference_cells(report)),
        caption(report),
    ]
    return "\n\n".join(parts) + "\n"


def caption(report: Report) -> str:
    """What the numbers are, in words."""
    row = report["rows"][0]
    tasks = f"pass@1 on {row['pass_at_1_n']} function tasks (higher is better); "
    return (
        f"nll: nats per answer token on {row['nll_tokens']:,} held-out tokens, the same for every "
        f"row (lower is better); {tasks if row['pass_at_1'] is not None else ''}tokens, FLOPs and "
        "time are those of training; differences are paired by example; "
        f'"{NO_GAIN}": the interval covers 0.'
    )


def row_cells(report: Report) -> list[tuple[str, ...]]:
    """The table of models, as text, in the order of HEADERS."""
    return [
        (
            row["model"],
            f"{row['nll']:.4f}",
            interval(row["nll_interval"], "{:.3f}".format),
            "-" if row["pass_at_1"] is None else f"{row['pass_at_1']:.0%}",
            interval(row["pass_at_1_interval"], "{:.0%}".format),
            count(row["params"]),
            count(row["active_params"]),
            f"{row['train_tokens']:,}",
            f"{row['train_flops']:.2e}" if row["train_flops"] else "0",
            duration(row["wall_s"]),
        )
        for row in report["rows"]
    ]


def difference_cells(report: Report) -> list[tuple[str, ...]]:
    """The table of paired differences, as text, in the order of DIFFERENCE_HEADERS."""
    table = []
    for entry in report["differences"]:
        cells = [f"{entry['model']} - {entry['minus']}"]
        for metric, form in (("nll", nats), ("pass_at_1", points)):
            d = entry[metric]
            if d is None:
                cells += ["-", "-", ""]
            else:
                cells += [form(d["mean"]), interval((d["low"], d["high"]), form), d["verdict"]]
        table.append(tuple(cells))
    return table


def interval(bounds: Sequence[float] | None, form: Callable[[float], str]) -> str:
    """'[low, high]', '-' for None."""
    return "-" if bounds is None else f"[{form(bounds[0])}, {form(bounds[1])}]"


def nats(difference: float) -> str:
    """A difference in nats: four decimals, or two digits of one that would show as 0."""
    shows = abs(difference) >= 5e-5 or not difference
    return f"{difference:+.4f}" if shows else f"{difference:+.1e}"


def points(share: float) -> str:
    """A difference of two shares in percentage points: 0.033 -> +3.3 pp."""
    return f"{100 * share:+.1f} pp"


def count(number: float) -> str:
    """134,515,008 -> 134.5M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds as 45 s or 2:05 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d} min"


def _table(headers: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i and header else "left", no_wrap=True)
    return table


def _mark(verdict: str) -> str:
    style = {"better": "green", "worse": "red", NO_GAIN: "yellow"}.get(verdict)
    return f"[{style}]{verdict}[/]" if style else verdict


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] + ["---:"] * (len(headers) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
