"""How a sweep of `launch.wise` chooses on validation problems and what it reports on others.

No flags here, so that a test can use it.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from moejax.evals import sweep
from moejax.evals.sampled import Sampled
from moejax.evals.sweep import Arm, Criterion, Problem, Sweep
from moejax.report import sweep_plots
from moejax.serve.sampling import SamplingConfig

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep as asked for, checked."""

    early: tuple[str, ...]
    late: str
    samplings: tuple[SamplingConfig, ...]
    grid: tuple[float, ...]
    points: int
    criterion: Criterion
    ks: tuple[int, ...]
    num_samples: int
    seed: int


def measure(
    run: Sweep, plan: Plan, splits: dict[str, list[Problem]]
) -> tuple[Row, list[Row], dict[str, Sampled]]:
    """Chooses on validation, reports on test: the result, all rows, the test arms' samples."""
    plain = plan.samplings[0]
    rows: list[Row] = []
    scores: dict[str, dict[float, float]] = {}

    def score(name: str, delta: float) -> float:
        arm = Arm(name, delta, plain)
        sampled = run.sampled(arm, "validation", splits["validation"])
        # At delta 0 every early checkpoint is the late one; its row stands under each name.
        rows.extend(sweep.rows_of(arm, "validation", sampled, plan.ks))
        return float(plan.criterion.values(sampled).mean())

    for name in plan.early:
        of_delta = functools.partial(score, name)
        if plan.points:
            scores[name] = sweep.search(of_delta, plan.points)
        else:
            scores[name] = {delta: of_delta(delta) for delta in plan.grid}
    pairs = [(value, -delta, name) for name, found in scores.items()
             for delta, value in found.items()]
    value, minus_delta, early = max(pairs)
    chosen = Arm(early, -minus_delta, plain)
    arms = {"late": Arm(early, 0.0, plain), "early": Arm(early, 1.0, plain), "chosen": chosen}
    arms |= {f"late, {sweep.describe_sampling(s)}": Arm(early, 0.0, s) for s in plan.samplings[1:]}
    sampled = {name: run.sampled(arm, "test", splits["test"]) for name, arm in arms.items()}
    for name, arm in arms.items():
        rows += [row | {"arm": name} for row in
                 sweep.rows_of(arm, "test", sampled[name], plan.ks)]
    result: Row = {
        "chosen": {"early": early, "delta": chosen.delta, "validation": value},
        "criterion": f"{plan.criterion.name}@{plan.criterion.k}",
        "scores": {name: {str(d): s for d, s in found.items()} for name, found in scores.items()},
        "test": [row for row in rows if row["split"] == "test"],
        "differences": {
            name: sweep.differences(sampled["chosen"], sampled[name], plan.ks)
            for name in arms if name != "chosen"
        },
        "score_name": "mean log-probability" if sampled["late"].scores is not None else None,
    }
    return result, rows, sampled


def draw_plots(
    plan: Plan, result: Row, rows: list[Row], sampled: dict[str, Sampled], folder: Path
) -> None:
    """Pass@k against delta (validation), histogram and plane (test), along the deltas."""
    folder.mkdir(parents=True, exist_ok=True)
    early, k = result["chosen"]["early"], max(plan.ks)
    for number, name in enumerate(plan.early):
        line = [r for r in rows if r["split"] == "validation" and r["early"] == name]
        for measure in ("pass", "maj"):
            title = f"{measure}@k on validation problems, early: {Path(name).name}"
            figure = sweep_plots.against_delta(line, measure, plan.ks, title)
            figure.savefig(folder / f"{measure}_against_delta_{number}.png", dpi=130)
    test = [row for row in rows if row["split"] == "test"]
    sweep_plots.bias_variance(test, k).savefig(folder / "bias_variance.png", dpi=130)
    shares = {name: sampled[name].correct.mean(1) for name in ("late", "chosen", "early")}
    sweep_plots.pass_histogram(shares).savefig(folder / "histogram.png", dpi=130)
    points = {
        "interpolated (validation)": [
            _point(rows, "validation", Arm(early, d, plan.samplings[0]).label, f"{d:g}", k)
            for d in sorted(map(float, result["scores"][early]))
        ],
        "on test problems": [_point(rows, "test", name, name, k) for name in sampled],
    }
    sweep_plots.along_training(points, k).savefig(folder / "pass_1_and_k.png", dpi=130)


def _point(rows: list[Row], split: str, arm: str, label: str, k: int) -> Row:
    found = {row["k"]: row for row in rows if row["split"] == split and row["arm"] == arm
             and row["measure"] == "pass"}
    one, many = ((found[n]["value"], found[n]["low"], found[n]["high"]) for n in (min(found), k))
    return {"label": label, "pass1": one, "passk": many}


def say(result: Row, plan: Plan) -> None:
    """What was chosen, and what it is worth on test problems, in lines."""
    chosen = result["chosen"]
    print(
        f"chosen   early {chosen['early']}, delta {chosen['delta']:g} ({result['criterion']} "
        f"{chosen['validation']:.3f} on validation problems)"
    )
    for other, gaps in result["differences"].items():
        for row in gaps:
            if row["measure"] == "pass" and row["k"] in (plan.ks[0], plan.ks[-1]):
                print(
                    f"test     chosen - {other}: pass@{row['k']} {row['value']:+.3f} "
                    f"[{row['low']:+.3f}, {row['high']:+.3f}] {row['verdict']}"
                )
