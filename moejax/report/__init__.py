"""Records to a table, plots and one HTML page: `write` and `render`."""

from __future__ import annotations

import os
from pathlib import Path

from moejax.io.atomic import write_json, write_text
from moejax.report.schema import MODELS, Report, check, difference
from moejax.report.table import markdown, render

__all__ = ["MODELS", "Report", "check", "difference", "markdown", "render", "write"]


def write(out_dir: str | os.PathLike[str], report: Report) -> list[Path]:
    """Writes report.json, plots/*.png and the self-contained report.html; returns their paths.

    Errors: ValueError where the report does not fit `moejax.report.schema`.
    """
    # About a second of imports that only a finished run needs.
    from moejax.report.page import page
    from moejax.report.plots import draw

    check(report)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", report)
    plots = draw(report, out / "plots")
    write_text(out / "report.html", page(report, plots))
    return [out / "report.json", *plots.values(), out / "report.html"]
