"""`launch.wise --stage=soup`: which of several models belong into their mean."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from launch import cli, wise_sweep
from moejax.core import tree
from moejax.evals.sampled import Sampled
from moejax.evals.sweep import Arm, Criterion, differences
from moejax.evals.tasks import TASKS, load_items
from moejax.io import atomic
from moejax.methods.interpolate import greedy_soup

Members = tuple[int, ...]


def soup_stage(names: Sequence[str], out: str, seed: int, allow_unrelated: bool) -> list[str]:
    """Finds a greedy soup's members, the best first; writes OUT/samples/ and OUT/soup.json.

    Every problem is one to choose on: what the soup is worth has to be asked of others. Empty for
    a dry run.
    """
    criterion = Criterion.parse(wise_sweep.CRITERION.value)
    num_samples, task = wise_sweep.NUM_SAMPLES.value, wise_sweep.TASK.value
    wise_sweep.check_ks({"--criterion": criterion.k})
    text = wise_sweep.SAMPLINGS.value[0]
    sampling = wise_sweep.sampling_of(text)
    wise_sweep.check_models(names, allow_unrelated)
    items = load_items(TASKS[task], wise_sweep.DATA.value, wise_sweep.NUM.value)
    print(
        f"soup     {task}: {len(items)} problems to choose on, {num_samples} samples each, of "
        f"{len(names)} models and {len(names) - 1} means",
        flush=True,
    )
    if cli.DRY_RUN.value:
        print("dry run: nothing written")
        return []
    identity: dict[str, Any] = {"models": list(names), "sampling": text, "seed": seed}
    identity |= {"criterion": wise_sweep.CRITERION.value, "num_samples": num_samples}
    claimed = (Path(out), identity, "soup_config.json")
    means: dict[str, Callable[[], tree.Tree]] = {}
    run, problems = wise_sweep.begin(names[0], means, items, claimed, num_samples, seed)
    seen: dict[Members, Sampled] = {}

    def score(members: Members) -> float:
        chosen = [names[i] for i in sorted(members)]
        label = " + ".join(chosen)
        means[label] = functools.partial(_mean, chosen)
        seen[members] = run.sampled(Arm(label, 1.0, sampling), "validation", problems)
        value = float(criterion.values(seen[members]).mean())
        print(f"score    {label}: {wise_sweep.CRITERION.value} {value:.4f}", flush=True)
        return value

    members = greedy_soup([score((i,)) for i in range(len(names))], score)
    _report(names, members, seen, criterion, Path(out))
    return [names[i] for i in members]


def _mean(names: Sequence[str]) -> tree.Tree:
    total = wise_sweep.params_of(names[0])
    for name in names[1:]:
        total = jax.tree.map(jnp.add, total, wise_sweep.params_of(name))
    return jax.tree.map(lambda w: w / len(names), total)


def _report(
    names: Sequence[str],
    members: Members,
    seen: dict[Members, Sampled],
    criterion: Criterion,
    folder: Path,
) -> None:
    gaps = []
    if len(members) > 1:
        gaps = differences(seen[members], seen[members[:1]], [criterion.k])
    chosen = [names[i] for i in members]
    result = {
        "members": chosen,
        "criterion": f"{criterion.name}@{criterion.k}",
        "tried": [
            {"models": [names[i] for i in tried], "score": float(criterion.values(of).mean())}
            for tried, of in seen.items()
        ],
        "soup_minus_best": gaps,
    }
    atomic.write_json(folder / "soup.json", result)
    print(f"soup     {len(members)} of {len(names)} models: {', '.join(chosen)}")
    for row in gaps:
        if row["measure"] == criterion.name:
            print(
                "         soup - best model, on the problems that it was chosen on: "
                f"{result['criterion']} {row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            )
