"""What the WiSE-FT study says: study.json, table.csv, table.md and plots, from all samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from launch.wise_arms import PLAIN, Seed
from moejax.evals import at_k, bootstrap, sweep
from moejax.evals.sampled import Sampled, maj_values, pass_values
from moejax.io import atomic
from moejax.report import sweep_plots
from moejax.report.table import as_csv
from moejax.serve.sampling import SamplingConfig

RIVALS = ("late", "base", "decayed", "EMA", "LAWA", "late T 1.3")


def write_report(
    config: ConfigDict, seeds: Sequence[Seed], facts: Mapping[str, float], folder: Path
) -> None:
    """study.json, table.csv and plots/ from what all seeds gave."""
    ks, top = config.sweep.k, max(config.sweep.k)
    rows = [row for seed in seeds for row in seed.rows]
    atomic.write_text(folder / "table.csv", as_csv(rows))
    summary = {
        "facts": dict(facts),
        "chosen": {seed.number: dataclasses.asdict(seed.chosen) for seed in seeds},
        "collapse": [collapse_of(seed, top) for seed in seeds],
        "differences": [
            {"seed": seed.number, "against": other}
            | {"rows": sweep.differences(seed.sampled["chosen"], seed.sampled[other], ks)}
            for seed in seeds
            for other in ("late", "decayed", "EMA", "LAWA", seed.chosen.early)
        ],
        "rl": [
            {"seed": seed.number}
            | {"rows": sweep.differences(
                seed.sampled["GRPO from chosen"], seed.sampled["GRPO from late"], ks)}
            for seed in seeds
        ],
        "matched": [matched(seed, top) for seed in seeds],
    }
    summary["pooled"] = pooled(seeds, top)
    summary["pooled differences"] = pooled_differences(seeds, (1, top))
    atomic.write_json(folder / "study.json", summary)
    atomic.write_text(folder / "table.md", as_markdown(summary, top))
    for seed in seeds:
        for name, figure in plots(seed, ks, config.sweep.temperatures).items():
            path = folder / "plots" / f"seed_{seed.number}_{name}.png"
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=130)


def pooled(seeds: Sequence[Seed], k: int) -> list[dict[str, Any]]:
    """A row per arm that every seed has: means over seeds, 95% intervals over problems."""
    columns: dict[str, Callable[[Sampled], np.ndarray]] = {
        "pass@1": lambda s: pass_values(s, 1),
        f"pass@{k}": lambda s: pass_values(s, k),
        f"maj@{k}": lambda s: maj_values(s, k),
        "unique": lambda s: np.array([at_k.unique_share(answers) for answers in s.answers]),
    }
    rows = []
    for name in _common(seeds):
        row: dict[str, Any] = {"arm": name}
        for column, of in columns.items():
            each = np.array([of(seed.sampled[name]) for seed in seeds])
            found = dataclasses.asdict(bootstrap.mean(each.mean(0)))
            row[column] = found | {"of seeds": each.mean(1).tolist()}
        rows.append(row)
    return rows


def pooled_differences(seeds: Sequence[Seed], ks: Sequence[int]) -> list[dict[str, Any]]:
    """Paired by problem, means over seeds: the chosen model minus its rivals, and after GRPO."""
    pairs = [("chosen", other) for other in RIVALS if other in _common(seeds)]
    rows = []
    for first, second in [*pairs, ("GRPO from chosen", "GRPO from late")]:
        for k in ks:
            a, b = (np.mean([pass_values(seed.sampled[name], k) for seed in seeds], axis=0)
                    for name in (first, second))
            gap = bootstrap.paired_mean(a, b)
            row = {"first": first, "second": second, "k": k, "p": bootstrap.flip_test(a, b)}
            rows.append(row | dataclasses.asdict(gap) | {"verdict": bootstrap.verdict(gap)})
    return rows


def _common(seeds: Sequence[Seed]) -> list[str]:
    return [name for name in seeds[0].sampled if all(name in seed.sampled for seed in seeds)]


def as_markdown(summary: Mapping[str, Any], k: int) -> str:
    """The two pooled tables, as they stand in BUILD.md."""
    columns = ("pass@1", f"pass@{k}", f"maj@{k}", "unique")
    lines = [f"| arm | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for row in summary["pooled"]:
        cells = [f"{row[c]['mean']:.3f} [{row[c]['low']:.3f}, {row[c]['high']:.3f}]"
                 for c in columns]
        lines.append(f"| {row['arm']} | {' | '.join(cells)} |")
    lines += ["", "| paired difference | k | pass@k | p |", "| --- | ---: | ---: | ---: |"]
    for row in summary["pooled differences"]:
        lines.append(
            f"| {row['first']} - {row['second']} | {row['k']} | {row['mean']:+.3f} "
            f"[{row['low']:+.3f}, {row['high']:+.3f}] | {row['p']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def collapse_of(seed: Seed, k: int) -> dict[str, Any]:
    """Whether there was diversity to lose: Pass@1 and Pass@k along the tuning."""
    names = ["base", *(f"step {step}" for step in seed.steps[:-1]), "late"]
    pass1 = [_value(seed, name, "pass", 1)["value"] for name in names]
    passk = [_value(seed, name, "pass", k)["value"] for name in names]
    gaps = sweep.differences(seed.sampled["late"], seed.sampled[names[int(np.argmax(passk))]], [k])
    return {
        "seed": seed.number,
        "steps": [0, *seed.steps],
        "pass@1": pass1,
        f"pass@{k}": passk,
        f"late minus the highest pass@{k}": gaps[0],
        "collapsed": pass1[-1] > pass1[0] and gaps[0]["high"] < 0,
    }


def matched(seed: Seed, k: int) -> dict[str, Any]:
    """Pass@k of the late and of the chosen model where temperature gives both the same Pass@1.

    At every Pass@1 that either was drawn at; between the temperatures that were drawn Pass@k is
    interpolated linearly in Pass@1, and None where a model's temperatures do not reach that far.
    """
    curves: dict[str, list[tuple[float, float]]] = {"late": [], "chosen": []}
    for name, arm in seed.arms.items():
        who = "late" if arm.delta == 0 else "chosen" if name.startswith("chosen") else None
        if who is not None and arm.sampling == SamplingConfig(arm.sampling.temperature):
            curves[who].append((_value(seed, name, "pass", 1)["value"],
                                _value(seed, name, "pass", k)["value"]))

    def at(level: float, points: list[tuple[float, float]]) -> float | None:
        x, y = np.array(sorted(points)).T
        return float(np.interp(level, x, y)) if x[0] <= level <= x[-1] else None

    levels = sorted(p for points in curves.values() for p, _ in points)
    rows: list[dict[str, float | None]] = [
        {"pass@1": level, **{f"{who} pass@{k}": at(level, p) for who, p in curves.items()}}
        for level in levels
    ]
    return {"seed": seed.number, "rows": rows}


def plots(seed: Seed, ks: Sequence[int], temperatures: Sequence[float]) -> dict[str, Any]:
    """{name: figure} of one seed."""
    early, k = seed.chosen.early, max(ks)
    line = [row for row in seed.rows
            if row["sampling"] == "T 1" and row["arm"] in _ends(seed, early)]
    names = ["base", *(f"step {step}" for step in seed.steps[:-1]), "late"]
    heated = sorted([*((t, f"late T {t:g}") for t in temperatures), (1.0, "late")])
    hot = [name for _, name in heated]
    points = {
        "along the tuning": [_point(seed, n, n, k) for n in names],
        "interpolated": [_point(seed, n, f"{seed.arms[n].delta:g}", k) for n in
                         sorted(seed.arms, key=lambda n: seed.arms[n].delta)
                         if 0 < seed.arms[n].delta < 1 and seed.arms[n].sampling == PLAIN],
        "temperature": [_point(seed, n, f"T {t:g}", k) for t, n in heated],
    }
    alone = {
        "late, cut": [_point(seed, n, n[5:], k) for n in seed.arms
                      if n.startswith("late T") and n not in hot],
        "others": [_point(seed, n, n, k) for n in ("decayed", "EMA", "LAWA")],
        "after GRPO": [_point(seed, n, n[5:], k) for n in seed.arms if n.startswith("GRPO")],
    }
    main = ("late", "chosen", early, "decayed")
    shares = {name: seed.sampled[name].correct.mean(1) for name in main}
    kept = {*main, "EMA", "LAWA", "base", "GRPO from late", "GRPO from chosen"}
    kept |= {name for name in seed.arms if name.startswith("late T")}
    return {
        "delta": sweep_plots.against_delta(
            line, "pass", ks, f"Pass@k on test problems, early: {early}"),
        "training": sweep_plots.along_training(points, k, alone),
        "histogram": sweep_plots.pass_histogram(shares),
        "plane": sweep_plots.bias_variance([r for r in seed.rows if r["arm"] in kept], k),
    }


def _ends(seed: Seed, early: str) -> set[str]:
    return {"late", early, "chosen"} | {name for name in seed.arms if name.startswith("delta ")}


def _point(seed: Seed, name: str, label: str, k: int) -> dict[str, Any]:
    ends = [_value(seed, name, "pass", n) for n in (1, k)]
    one, many = ((row["value"], row["low"], row["high"]) for row in ends)
    return {"label": label, "pass1": one, "passk": many}


def _value(seed: Seed, arm: str, measure: str, k: int) -> dict[str, Any]:
    for row in seed.rows:
        if row["arm"] == arm and row["measure"] == measure and row["k"] == k:
            return row
    raise KeyError((arm, measure, k))
