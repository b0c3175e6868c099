"""`launch.shadow --stage=report`: RUN/report.html, report.json and plots of all that is there."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch import shadow_ranking
from launch import shadow_tables as tables
from launch.shadow_collect import POOLED
from launch.shadow_evaluate import WINDOWS, incomplete, read
from launch.shadow_train import DEJAVU, FOLDERS
from moejax.core.errors import InputError
from moejax.io import atomic
from moejax.methods.shadow_predictor import hash_folder
from moejax.methods.shadow_traces import Pooled
from moejax.report import shadow_plots as plots
from moejax.report.page import STYLE, _figure, _table
from moejax.report.plots import DPI

PREDICTORS = ("unified", "per_layer_normalised", "token", "dejavu", "dejavu_equal")
SAID = ("static", "dejavu", "dejavu_token", "random", "oracle")  # on the console


def main(values: dict[str, Any]) -> None:
    """Writes the report of the stages that have run; sets that are not judged whole are named."""
    if values["dry_run"]:
        print("dry run: nothing written")
        return
    workdir = Path(values["workdir"])
    records = {(name, record["arm"]): record for name, record in read(workdir)}
    heldout = workdir / "heldout.json"
    if not records and not heldout.exists():
        raise InputError(f"{workdir} has nothing to report: run --stage=train or evaluate first")
    report: dict[str, Any] = {"heldout": atomic.read_json(heldout) if heldout.exists() else {}}
    report["incomplete"] = incomplete(workdir)
    report["arms"] = tables.arm_rows(records)
    report["paired"] = tables.paired_rows(records)
    report["causes"] = tables.cause_rows(records, report["heldout"])
    report["ranking"] = list(shadow_ranking.rows(workdir))
    bench = workdir / "bench.json"
    speed = atomic.read_json(bench)["rows"] if bench.exists() else []
    report["speed"] = tables.quality_and_speed(speed, records, _own_predictors(workdir))
    folder = workdir / "plots"
    folder.mkdir(exist_ok=True)
    figures = _figures(records, report, workdir)
    paths = {}
    for title, (name, figure) in figures.items():
        paths[title] = folder / f"{name}.png"
        figure.savefig(paths[title], dpi=DPI)
    atomic.write_json(workdir / "report.json", report)
    atomic.write_text(workdir / "report.html", _page(report, paths))
    for line in report["incomplete"]:
        print(line)
    for row in report["paired"]:
        if row["budget"] == "local" and row["minus"] in SAID:
            what = next(n for n in ("nats_per_token", "gold_margin") if n in row)
            print(
                f"{row['set']:9} {row['place']:8} {row['sparsity']:.0%} {row['method']} minus "
                f"{row['minus']:12} {what} {tables.shown(row[what])} {row[what]['verdict']}"
            )
    print(f"written  {workdir}/report.html, report.json, plots/")


def _own_predictors(workdir: Path) -> dict[str, str]:
    """The hash of each predictor of RUN -> its variant, of DejaVu's their name."""
    folders = {variant: workdir / name for variant, name in (FOLDERS | DEJAVU).items()}
    return {hash_folder(path): variant for variant, path in folders.items() if path.exists()}


def _figures(records: tables.Records, report: dict[str, Any], workdir: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    sets = dict.fromkeys(name for name, _ in records)
    for name in sets:
        dense = records.get((name, "dense-both-0-local"))
        if dense is None:
            continue
        texts = name == WINDOWS
        for place in dict.fromkeys(r["place"] for (n, _), r in records.items() if n == name):
            what = "perplexity after the prompt" if texts else "accuracy"
            drawn = [("value", what, tables.value_of(dense))]
            if not texts:
                level = float(np.mean(dense["gold_margin"]))
                drawn.append(("gold_margin", "gold margin, nats (above 0: right)", level))
            for field, what, level in drawn:
                points = tables.lines(records, name, place, field)
                for when, methods in plots.WHEN.items():
                    mine = {m: line for m, line in points.items() if m in methods}
                    if sum(map(len, mine.values())) < 3:
                        continue  # a point or two: the tables say it
                    title = f"{name}, {place} pruned, local budgets, decided {when}"
                    alone = [m for m in ("griffin_single", "cats") if m in mine]
                    if place == "both" and alone:
                        title += f" ({alone[0].replace('_', ' ')}: neurons alone)"
                    key = f"{name}_{place}_{field}_{when.replace(' ', '_')}"
                    figure = plots.quality_plot(mine, level, what, title)
                    found[f"{name}: {place}, {field}, decided {when}"] = (key, figure)
    for part in ("heads", "blocks"):
        per_layer = {
            name: report["heldout"][name][part]["per_layer"]
            for name in PREDICTORS
            if name in report["heldout"]
        }
        if per_layer:
            found[f"Held-out texts: {part}"] = (
                f"heldout_{part}", plots.heldout_plot(per_layer, part)
            )  # fmt: skip
    for method in ("predicted", "oracle"):
        record = records.get((WINDOWS, f"{method}-both-0.5-local"), {})
        if "kept_maps" in record:
            title = f"How often each is kept, {method}, half of a layer (WikiText)"
            first = atomic.read_json(workdir / "train.json")["mask"]["first"]
            figure = plots.maps_plot(record["kept_maps"], "unit", False, first)
            found[title] = (f"kept_{method}", figure)
    found |= _maps(workdir)
    if report["speed"]:
        found["Speed"] = ("speed", plots.speed_plot(report["speed"]))
    return found


def _maps(workdir: Path) -> dict[str, Any]:
    """Static importance of heads and neurons under every criterion, of the training texts."""
    total = Pooled()
    for path in sorted((workdir / "traces").glob(POOLED.format(0).replace("00000", "*"))):
        arrays = atomic.read_npz(path, lambda name: name.startswith("train/"))
        total.merge(Pooled.of_arrays({n.removeprefix("train/"): a for n, a in arrays.items()}))
    if not total.sums:
        return {}
    heads = {n.removeprefix("heads/"): total.mean(n) for n in total.sums if n.startswith("heads/")}
    found = {"Heads by criterion": ("maps_heads", plots.maps_plot(heads, "head"))}
    neurons = {}
    for key in total.sums:
        if key.startswith("neurons/"):
            mean = total.mean(key)
            width = max(1, mean.shape[-1] // 64)
            cut = mean[:, : mean.shape[-1] // width * width]
            neurons[key.removeprefix("neurons/")] = cut.reshape(len(cut), -1, width).mean(-1)
    title = "neurons, in the model's own order, means of neighbours"
    found["Neurons by criterion"] = ("maps_neurons", plots.maps_plot(neurons, title))
    return found


def _page(report: dict[str, Any], paths: dict[str, Path]) -> str:
    parts = [
        "<h1>Contextual sparsity (ShadowLLM)</h1>",
        "<p>Masks are decided from the prompt, "
        "which is read densely; the tokens after it are computed under the mask and scored. The "
        "first of them is predicted by the prompt's last, which no mask changes. Oracle "
        "masks are this text's own scores, of a question those of its right answer. DejaVu token "
        "decides at every token in every layer, predicted token once by the first (it learned from "
        "tokens), predicted each after every token for the next; TEAL and CATS look at every "
        "token, in every layer. "
        "Shares are of what can be kept whole: of nine heads, 30% pruned are two. "
        "Differences are paired by window or question, with 95% bootstrap intervals.</p>",
    ]
    parts += [f"<p><strong>{html.escape(line)}</strong></p>" for line in report["incomplete"]]
    if report["heldout"]:
        parts += ["<h2>Predictors on held-out texts</h2>", _heldout_table(report["heldout"])]
    for title, rows in (
        ("Paired differences", report["paired"]),
        ("What separates the causes (WikiText, nats per token)", report["causes"]),
        ("How predictions rank a layer's units on what is judged", report["ranking"]),
    ):
        if rows:
            parts += [f"<h2>{title}</h2>", _rows_table(rows)]
    if report["speed"]:
        parts += ["<h2>Quality and speed, one mask</h2>", _rows_table(report["speed"])]
    parts += [_figure(title, path) for title, path in paths.items()]
    if report["arms"]:
        parts += ["<h2>Every arm</h2>", _rows_table(report["arms"])]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>moejax: contextual sparsity</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _heldout_table(heldout: dict[str, Any]) -> str:
    headers = ["predictor", "parameters", "share"]
    fields = ("spearman", "static_spearman", "overlap", "static_overlap", "gain", "gain_in_source")
    headers += [
        f"{part} {field.replace('_', ' ')}" for part in ("heads", "blocks") for field in fields
    ]
    rows = []
    for name in PREDICTORS:
        if name in heldout:
            one = heldout[name]
            cells = [name, f"{one['params']:,}", f"{one['share']:.2%}"]
            parts = (one[p].get(f) for p in ("heads", "blocks") for f in fields)
            cells += ["" if value is None else f"{value:.3f}" for value in parts]
            rows.append(cells)
    note = (
        f"<p>{heldout['train']} texts trained on; overlap: of the better half of a layer's units; "
        "gain: correlation of a text's deviations from the mean over texts, predicted and true; in "
        "source: from the mean over texts of the same source.</p>"
    )
    return _table(headers, rows) + note


def _rows_table(rows: Sequence[dict[str, Any]]) -> str:
    flat = []
    for row in rows:
        cells: dict[str, str] = {}
        for name, value in row.items():
            if isinstance(value, dict) and "verdict" in value:
                cells[name.replace("_", " ")] = tables.shown(value)
                cells[f"{name.replace('_', ' ')}: verdict"] = value["verdict"]
            else:
                cells[name.replace("_", " ")] = html.unescape(tables.shown(value))
        flat.append(cells)
    headers = list(dict.fromkeys(name for cells in flat for name in cells))
    return _table(headers, [[cells.get(name, "") for name in headers] for cells in flat])
