"""A report as one HTML page that needs nothing else: no script, no outside file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from moejax.report.schema import NO_GAIN, Report
from moejax.report.table import (
    DIFFERENCE_HEADERS,
    HEADERS,
    caption,
    difference_cells,
    row_cells,
)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto }
th, td { padding: 0.3rem 0.6rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left }
figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto }
pre { background: #f4f4f4; padding: 0.8rem; overflow-x: auto; font-size: 0.8rem }
.better { color: #00694b } .worse { color: #b3261e } .none { color: #6b5900 }
"""
VERDICT_CLASS = {"better": "better", "worse": "worse", NO_GAIN: "none"}


def page(report: Report, plots: Mapping[str, Path]) -> str:
    """The whole page as text; the plots ({title: PNG}) are embedded."""
    parts = [
        "<h1>moejax: dense to experts and back</h1>",
        "<h2>Models</h2>",
        _table(HEADERS, row_cells(report)),
        "<h2>Does the learned merge gain anything?</h2>",
        _table(DIFFERENCE_HEADERS, difference_cells(report)),
        f"<p>{html.escape(caption(report))}</p>",
        *(_figure(title, path) for title, path in plots.items()),
    ]
    if report.get("run"):
        shown = json.dumps(report["run"], indent=2, ensure_ascii=False)
        parts += ["<h2>What was run</h2>", f"<pre>{html.escape(shown)}</pre>"]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>moejax report</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in headers)
    body = "".join(f"<tr>{''.join(_cell(text) for text in row)}</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    kind = VERDICT_CLASS.get(text)
    return f"<td{f' class={kind}' if kind else ''}>{html.escape(text)}</td>"


def _figure(title: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    alt = html.escape(title, quote=True)
    return (
        f"<h2>{html.escape(title)}</h2>\n"
        f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"></figure>'
    )
