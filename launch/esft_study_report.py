"""What the ESFT study says: study.json, table.md and plots/, made from the arms' raw results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.evals.bootstrap import Interval, verdict
from moejax.io import atomic
from moejax.report import esft_plots

RIVALS = ("full", "lora", "random")
FORGOTTEN = (0.01, 0.03, 0.1, 0.2, 0.5)  # nats of the other domains above the base
NOTE = (
    "Nats per token on test rows; others: the mean of the other domains' means. Intervals: 95%, "
    "rows of all domains drawn anew, after the mean over runs (seeds; draws of random experts); "
    "differences are paired by row."
)
Result = Mapping[str, Any]  # a result.json of launch/esft_lab.py
Rows = Mapping[str, Sequence[float] | np.ndarray]  # domain -> nats per token of every row


def method_of(arm: str) -> str:
    """All draws of random experts are one method."""
    return "random" if arm.startswith("random_") else arm


def write_report(
    tried: Mapping[str, Sequence[Result]],
    results: Sequence[Result],
    specialisation: Mapping[str, Any],
    target: str,
    folder: Path,
) -> None:
    """study.json, table.md, plots/ of the runs that are done.

    tried: method -> its runs at all rates, on the first seed; results: runs at the best rates.
    """
    runs: dict[str, list[Result]] = {}
    for result in results:
        runs.setdefault(method_of(result["arm"]), []).append(result)
    rows = [_row(method, found, target) for method, found in runs.items()]
    rates = [
        {"method": method, "rate": r["rate"]}
        | {part: target_and_others(r["losses"][part], target) for part in ("validation", "test")}
        for method, found in tried.items()
        for r in found
    ]
    study = {"rows": rows, "differences": _differences(runs, target), "rates": rates}
    base = target_and_others(_mean_rows(runs["frozen"]), target)
    study["at_equal_forgetting"] = at_equal_forgetting(rates, base)
    atomic.write_json(folder / "study.json", study)
    atomic.write_text(folder / "table.md", as_markdown(study, target))
    (folder / "plots").mkdir(exist_ok=True)
    changes = {d["method"]: d for d in study["differences"] if d["minus"] == "frozen"}
    figure = esft_plots.frontier_plot(changes, rates, base, target)
    figure.savefig(folder / "plots" / "frontier.png", dpi=130)
    names = specialisation["domains"]
    top_k = round(specialisation["overlap"][0][0])
    figure = esft_plots.overlap_plot(names, specialisation["overlap"], top_k)
    figure.savefig(folder / "plots" / "overlap.png", dpi=130)


def target_and_others(losses: Rows, target: str) -> dict[str, float]:
    """Mean loss on the "target", and the mean of the "others", the other domains' means."""
    parts = _parts(target, losses)
    return {name: float(np.mean([np.mean(losses[d]) for d in parts[name]])) for name in parts}


def at_equal_forgetting(
    rates: Sequence[Mapping[str, Any]], base: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Per method what the target has gained where the others have lost FORGOTTEN, None if never.

    Between rates, and between the base and the lowest rate, along straight lines.
    """
    found = []
    for method in dict.fromkeys(r["method"] for r in rates):
        tests = [r["test"] for r in rates if r["method"] == method]
        points = [(t["others"] - base["others"], base["target"] - t["target"]) for t in tests]
        gains: list[float | None] = []
        for level in FORGOTTEN:
            spans = zip([(0.0, 0.0), *points], points, strict=False)
            span = next((s for s in spans if s[0][0] <= level <= s[1][0]), None)
            xs, ys = zip(*span, strict=True) if span else ((), ())
            gains.append(float(np.interp(level, xs, ys)) if span else None)
        found.append({"method": method, "gains": gains})
    return found


def mean_of_means(groups: Sequence[np.ndarray]) -> Interval:
    """The mean of groups' means; 95 % by the normal distribution, members of groups drawn anew."""
    means = [float(np.mean(group)) for group in groups]
    variances = [np.var(group, ddof=1) / len(group) for group in groups]
    half = 1.96 * float(np.sqrt(np.sum(variances))) / len(groups)
    value = float(np.mean(means))
    return Interval(value, value - half, value + half)


def _parts(target: str, losses: Iterable[str]) -> dict[str, list[str]]:
    return {"target": [target], "others": [name for name in losses if name != target]}


def _mean_rows(found: Sequence[Result]) -> dict[str, np.ndarray]:
    """Domain -> loss of every test row, the mean over runs."""
    losses = [result["losses"]["test"] for result in found]
    return {name: np.mean([one[name] for one in losses], axis=0) for name in losses[0]}


def _row(method: str, found: Sequence[Result], target: str) -> dict[str, Any]:
    rows = _mean_rows(found)
    row: dict[str, Any] = {"method": method, "runs": len(found), "rate": found[0]["rate"]}
    row["trained_params"] = found[0]["trained_params"]
    for name, domains in _parts(target, rows).items():
        each = [target_and_others(r["losses"]["test"], target)[name] for r in found]
        row[name] = dataclasses.asdict(mean_of_means([rows[d] for d in domains]))
        row[name] |= {"of runs": each}
    row["domains"] = {name: float(np.mean(values)) for name, values in rows.items()}
    return row


def _differences(runs: Mapping[str, Sequence[Result]], target: str) -> list[dict[str, Any]]:
    """Every method minus the frozen base, and those of chosen experts minus their rivals."""
    pairs = [(method, "frozen") for method in runs if method != "frozen"]
    chosen = [method for method in runs if method.startswith("esft_")]
    pairs += [(one, other) for one in chosen for other in RIVALS if other in runs]
    found = []
    for one, other in pairs:
        a, b = _mean_rows(runs[one]), _mean_rows(runs[other])
        row: dict[str, Any] = {"method": one, "minus": other}
        for name, domains in _parts(target, a).items():
            gap = mean_of_means([a[d] - b[d] for d in domains])
            word = verdict(gap, lower_is_better=True)
            row[name] = dataclasses.asdict(gap) | {"verdict": word}
        found.append(row)
    return found


def as_markdown(study: Mapping[str, Any], target: str) -> str:
    """Four tables, as they stand in BUILD.md."""
    names = list(study["rows"][0]["domains"])
    lines = [_line("method", "runs", "rate", "trained", *names, "others"),
             "| --- |" + " ---: |" * (len(names) + 4)]
    for r in study["rows"]:
        cells = [_cell(r["target"], "{:.4f}".format) if n == target else f"{r['domains'][n]:.4f}"
                 for n in names]
        others = _cell(r["others"], "{:.4f}".format)
        lines.append(_line(
            r["method"], r["runs"], f"{r['rate']:g}", f"{r['trained_params']:,}", *cells, others))
    lines += ["", _line("paired difference", target, "", "others", ""),
              "| --- | ---: | --- | ---: | --- |"]
    for d in study["differences"]:
        cells = [text for name in ("target", "others")
                 for text in (_cell(d[name], "{:+.4f}".format), d[name]["verdict"])]
        lines.append(_line(f"{d['method']} - {d['minus']}", *cells))
    lines += ["", _line("first seed, by rate: target / others", *_rates(study)),
              "| --- |" + " ---: |" * len(_rates(study))]
    for method in dict.fromkeys(r["method"] for r in study["rates"]):
        tests = [r["test"] for r in study["rates"] if r["method"] == method]
        lines.append(_line(method, *(f"{t['target']:.3f} / {t['others']:.3f}" for t in tests)))
    lines += ["", _line("first seed: gain on the target where the others have lost",
                        *(f"{level:g}" for level in FORGOTTEN)),
              "| --- |" + " ---: |" * len(FORGOTTEN)]
    for r in study["at_equal_forgetting"]:
        gains = ("" if gain is None else f"{gain:.3f}" for gain in r["gains"])
        lines.append(_line(r["method"], *gains))
    return "\n".join([*lines, "", NOTE]) + "\n"


def _rates(study: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(f"{r['rate']:g}" for r in study["rates"]))


def _line(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _cell(value: Mapping[str, Any], form: Callable[[float], str]) -> str:
    return f"{form(value['mean'])} [{form(value['low'])}, {form(value['high'])}]"
