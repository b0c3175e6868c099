"""From a report's dict to text, plots and a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib.image

from moejax import report
from moejax.report.plots import coefficients_plot, intervals_plot
from moejax.report.table import WIDTH, count, duration
from tests.report.fake_report import fake_report

PLOTS = {"nll", "pass_at_1", "training", "coefficients", "expert_load"}


def test_write_leaves_json_plots_and_a_page_that_needs_nothing_else(tmp_path: Path):
    given = fake_report(num_layers=5, num_routed=7)
    paths = report.write(tmp_path / "new" / "run", given)
    assert all(path.is_file() for path in paths)
    assert json.loads((tmp_path / "new/run/report.json").read_text()) == given
    assert {path.stem for path in paths if path.suffix == ".png"} == PLOTS
    page = (tmp_path / "new/run/report.html").read_text()
    assert page.count("data:image/png;base64,") == len(PLOTS)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "made up &lt;b&gt;" in page  # what a run says of itself is text, not markup
    for row in given["rows"]:
        assert row["model"] in page


def test_every_plot_is_a_picture_with_something_on_it(tmp_path: Path):
    for path in report.write(tmp_path, fake_report(num_layers=4)):
        if path.suffix == ".png":
            pixels = matplotlib.image.imread(path)
            assert min(pixels.shape[:2]) > 200
            assert len({tuple(p) for p in pixels[::7, ::7].reshape(-1, pixels.shape[2])}) > 5


def test_a_run_that_executed_nothing_has_no_pass_at_1(tmp_path: Path):
    given = fake_report(num_layers=2)
    for part in ("curves", "coefficients", "expert_load", "run"):
        del given[part]
    for row in given["rows"]:
        row.update(pass_at_1=None, pass_at_1_n=0, pass_at_1_interval=None)
    for entry in given["differences"]:
        entry["pass_at_1"] = None
    paths = report.write(tmp_path, given)
    assert [path.name for path in paths] == ["report.json", "nll.png", "report.html"]
    assert "pass@1 on" not in report.render(given)


def test_render_shows_every_row_and_verdict_in_its_width():
    given = fake_report()
    text = report.render(given)
    tables = text.splitlines()[:-1]  # the last line is prose, which the terminal wraps
    assert max(map(len, tables)) <= WIDTH
    assert "…" not in text and "\x1b" not in text
    for row in given["rows"]:
        assert f"{row['model']} " in text
    assert "better" in text and "no gain" in text
    assert "\x1b" in report.render(given, color=True)


def test_markdown_has_the_same_cells():
    lines = report.markdown(fake_report()).splitlines()
    assert sum(line.startswith("| merged_learned") for line in lines) == 4
    assert any("| no gain |" in line for line in lines)


def test_intervals_plot_spans_the_intervals():
    given = fake_report()
    axes = intervals_plot(given, "nll").axes[0]
    low, high = axes.get_xlim()
    assert low < min(r["nll_interval"][0] for r in given["rows"])
    assert high > max(r["nll_interval"][1] for r in given["rows"])
    assert [t.get_text() for t in axes.get_yticklabels()] == list(report.MODELS)


def test_coefficients_near_uniform_are_not_magnified():
    """A deviation of 0.1% must not fill the picture."""
    routed = [[1 / 3 + 3e-4, 1 / 3 - 3e-4, 1 / 3]] * 4
    axes = coefficients_plot({"lam": [0.75] * 4, "routed": routed}).axes[0]
    low, high = axes.get_ylim()
    assert high - low > 0.06


def test_coefficients_per_matrix_get_a_panel_each():
    table = [[0.5, 0.5]] * 3
    routed = {"gate": table, "up": table, "down": table}
    figure = coefficients_plot({"lam": [0.7, 0.75, 0.8], "routed": routed})
    assert [axes.get_ylabel() for axes in figure.axes] == [f"{m} coefficient" for m in routed]
    assert "0.700 to 0.800" in figure.axes[0].get_title()


def test_units():
    assert (count(134_515_008), count(7.03e9), count(12)) == ("134.5M", "7.0B", "12")
    assert (duration(45.2), duration(125.4), duration(99.9)) == ("45 s", "2:05 min", "1:40 min")
