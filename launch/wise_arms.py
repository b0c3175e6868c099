"""The arms of the WiSE-FT study: what is drawn for each seed, chosen, compared and plotted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from launch.wise_training import Lab, reinforced, tuned
from moejax.core import tree
from moejax.evals import sweep
from moejax.evals.sampled import Sampled
from moejax.evals.sweep import Arm, Criterion, Sweep
from moejax.methods.interpolate import ema_weights
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
    for temperature in config.sweep.chosen_temperatures:
        hot = SamplingConfig(temperature)
        arms[f"chosen T {temperature:g}"] = dataclasses.replace(chosen, sampling=hot)
    for name in ("decayed", "EMA", "LAWA", "GRPO from late", "GRPO from chosen"):
        arms[name] = Arm(name, 1.0, PLAIN)
    return arms
