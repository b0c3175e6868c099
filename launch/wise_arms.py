"""The arms of the WiSE-FT study: what is drawn for each seed, chosen, compared and plotted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from launch.wise_training import Lab, reinforced, tuned
from moejax.core import tree
from moejax.evals import sweep
from moejax.evals.sampled import Sampled
from moejax.evals.sweep import Arm, Criterion, Sweep
from moejax.io import atomic
from moejax.methods.interpolate import ema_weights
from moejax.report import sweep_plots
from moejax.report.table import as_csv
from moejax.serve.sampling import SamplingConfig

PLAIN = SamplingConfig(1.0)


@dataclasses.dataclass
class Seed:
    """What one seed gave: rows of all arms, samples of the arms on test, what was chosen."""

    number: int
    steps: list[int]
    chosen: Arm
    arms: dict[str, Arm]
    sampled: dict[str, Sampled]
    rows: list[dict[str, Any]]


def measure_seed(
    lab: Lab, config: ConfigDict, base: tree.Tree, number: int, folder: Path, say: Callable
) -> Seed:
    """Tunes, chooses on validation, draws every arm on test."""
    s = config.sweep
    points = tuned(lab, config, base, number, folder / "sft", "constant")
    decayed = tuned(lab, config, base, number, folder / "sft_decayed", "linear")
    steps = list(points)
    late = points[steps[-1]]
    models: dict[str, tree.Tree] = {f"step {step}": points[step] for step in steps[:-1]}
    models["base"] = base
    models["decayed"] = decayed[steps[-1]]
    models["EMA"] = weighted(list(points.values()), ema_weights(len(points), 0.7))
    half = list(points.values())[len(points) // 2 :]
    models["LAWA"] = weighted(half, [1 / len(half)] * len(half))
    early = {name: (lambda name=name: models[name]) for name in models}

    def sweep_of(num_samples: int) -> Sweep:
        drawn = folder / "samples"
        return Sweep(late, early, lab.draw, num_samples, drawn, seed=number, progress=say)

    chosen = choose(sweep_of(s.validation_samples), lab, config, [f"step {n}" for n in steps[:-1]])
    wise = sweep.mixed(models[chosen.early], late, jnp.float32(chosen.delta))
    models["GRPO from late"] = reinforced(lab, config, late, number, folder / "grpo_late")
    models["GRPO from chosen"] = reinforced(lab, config, wise, number, folder / "grpo_chosen")
    early |= {name: (lambda name=name: models[name]) for name in models}
    run = sweep_of(s.num_samples)
    arms = test_arms(config, chosen, [f"step {step}" for step in steps[:-1]])
    problems = [problem for _, problem in lab.test]
    sampled = {name: run.sampled(arm, "test", problems) for name, arm in arms.items()}
    rows = []
    for name, arm in arms.items():
        for row in sweep.rows_of(arm, "test", sampled[name], s.k):
            rows.append({"seed": number} | row | {"arm": name})
    return Seed(number, steps, chosen, arms, sampled, rows)


def weighted(models: Sequence[tree.Tree], weights: Sequence[float]) -> tree.Tree:
    """The weighted sum of parameter trees."""
    flats = [tree.flatten(model) for model in models]
    return tree.unflatten({
        path: sum(w * flat[path] for w, flat in zip(weights, flats, strict=True))
        for path in flats[0]
    })


def choose(run: Sweep, lab: Lab, config: ConfigDict, early: Sequence[str]) -> Arm:
    """The early checkpoint and delta that are best on the validation problems."""
    criterion = Criterion.parse(config.sweep.criterion)
    problems = [problem for _, problem in lab.validation]
    arms = [Arm(name, delta, PLAIN) for name in early for delta in config.sweep.deltas]
    return max(
        arms, key=lambda arm: criterion.values(run.sampled(arm, "validation", problems)).mean()
    )


def test_arms(config: ConfigDict, chosen: Arm, early: Sequence[str]) -> dict[str, Arm]:
    """What is compared on test problems: {name: arm}."""
    arms = {"late": Arm("late", 0.0, PLAIN), "chosen": chosen}
    arms |= {name: Arm(name, 1.0, PLAIN) for name in ("base", *early)}
    arms |= {
        f"delta {delta:g}": Arm(chosen.early, delta, PLAIN)
        for delta in config.sweep.deltas
        if delta != chosen.delta
    }
    for temperature in config.sweep.temperatures:
        arms[f"late T {temperature:g}"] = Arm("late", 0.0, SamplingConfig(temperature))
    for cut in (SamplingConfig(1.3, top_k=4), SamplingConfig(1.3, top_p=0.9)):
        arms[f"late {sweep.describe_sampling(cut)}"] = Arm("late", 0.0, cut)
    min_p = SamplingConfig(1.6, min_p=0.1)
    arms[f"late {sweep.describe_sampling(min_p)}"] = Arm("late", 0.0, min_p)
    hot = SamplingConfig(1.3)
    arms["chosen T 1.3"] = dataclasses.replace(chosen, sampling=hot)
    for name in ("decayed", "EMA", "LAWA", "GRPO from late", "GRPO from chosen"):
        arms[name] = Arm(name, 1.0, PLAIN)
    return arms


# -- the report ------------------------------------------------------------------------------------


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
    atomic.write_json(folder / "study.json", summary)
    for seed in seeds:
        for name, figure in plots(seed, ks).items():
            path = folder / "plots" / f"seed_{seed.number}_{name}.png"
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=130)


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
    """Pass@k of the late model at the temperature where its Pass@1 equals the chosen one's.

    Between the temperatures that were drawn both are interpolated linearly in Pass@1; None where
    no temperature gets there.
    """
    hot = sorted(
        (arm.sampling.temperature, name)
        for name, arm in seed.arms.items()
        if arm.delta == 0 and arm.sampling == SamplingConfig(arm.sampling.temperature)
    )
    points = sorted(
        (_value(seed, name, "pass", 1)["value"], _value(seed, name, "pass", k)["value"])
        for _, name in hot
    )
    wanted = _value(seed, "chosen", "pass", 1)["value"]
    x = [p for p, _ in points]
    inside = x[0] <= wanted <= x[-1]
    return {
        "seed": seed.number,
        "pass@1": wanted,
        f"chosen pass@{k}": _value(seed, "chosen", "pass", k)["value"],
        f"late pass@{k} at that pass@1": (
            float(np.interp(wanted, x, [p for _, p in points])) if inside else None
        ),
        "temperatures": [t for t, _ in hot],
    }


def plots(seed: Seed, ks: Sequence[int]) -> dict[str, Any]:
    """{name: figure} of one seed."""
    early, k = seed.chosen.early, max(ks)
    line = [row for row in seed.rows
            if row["sampling"] == "T 1" and row["arm"] in _ends(seed, early)]
    names = ["base", *(f"step {step}" for step in seed.steps[:-1]), "late"]
    points = {
        "along the tuning": [_point(seed, n, n, k) for n in names],
        "interpolated": [_point(seed, n, f"{seed.arms[n].delta:g}", k) for n in seed.arms
                         if 0 < seed.arms[n].delta < 1 and seed.arms[n].sampling == PLAIN],
        "temperature": [_point(seed, n, n[5:], k) for n in seed.arms if n.startswith("late T")],
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
        "training": sweep_plots.along_training(points, k),
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
