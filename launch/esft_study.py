"""The study of ESFT at a size that two cores can train (arXiv 2407.01906 is about 16B).

    python -m launch.esft_study --config=configs/esft/study.py --workdir=runs/esft_study

A small mixture of experts is pre-trained on five domains; if its experts have specialised, it is
adapted to one of them by full fine-tuning, LoRA of equally many parameters, ESFT by token and gate
scores, and, of the same counts, experts by gradients and at random, each at the best of the same
learning rates and over seeds. WORKDIR gets every run's raw losses (arms/ARM/RATE/SEED/result.json),
specialisation.json, and, made from them, table.csv and frontier.png. Started again it goes on
where it was.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags

from launch import cli
from launch.esft_domains import load_domains
from launch.esft_lab import (
    Bench,
    arms_of,
    equal_rank,
    model_of,
    pretrained,
    specialisation,
    target_and_others,
)
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic
from moejax.methods import score_files
from moejax.methods.esft import split_params
from moejax.models import flops
from moejax.models.config import ModelConfig
from moejax.report.esft_plots import frontier_plot
from moejax.train.loop import claim_folder

CONFIG = config_flags.DEFINE_config_file("config", "configs/esft/study.py", "The study's settings.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study; resumed if it is there.")
# Two-sided 95 % quantiles of Student's t for 1 to 5 degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571)


def main(argv) -> None:
    del argv
    config = CONFIG.value
    if cli.DRY_RUN.value:
        print(_sizes(model_of(config, config.data.vocab_size)))
        print("dry run: nothing trained, nothing written")
        return
    if WORKDIR.value is None:
        raise InputError("--workdir is missing: name the folder that the study is kept in")
    workdir = Path(WORKDIR.value)
    free = ["seeds", "draws", "specialised_below"]
    claim_folder(workdir, config.to_dict(), "study_config.json", free=free)
    domains = load_domains(config, workdir)
    model = model_of(config, domains.vocab_size)
    for name, parts in domains.rows.items():
        print(f"data     {name}: {', '.join(f'{len(r)} {p}' for p, r in parts.items())} rows")
    print(_sizes(model), flush=True)
    base = pretrained(config, model, domains, workdir / "pretrain")
    found = specialisation(config, model, base, domains)
    atomic.write_json(workdir / "specialisation.json", found)
    print(
        f"experts  the target needs {found['experts_needed'][config.target]:.1f} a layer for a "
        f"token score of {config.thresholds.token:g}, an even router {found['even_router']} "
        f"(relative {found['relative']:.2f})"
    )
    if found["relative"] > config.specialised_below:
        raise InputError(
            f"the experts have not specialised: the target needs {found['relative']:.2f} of an "
            f"even router's experts, more than {config.specialised_below:g}; pre-train longer, or "
            "with more experts or a smaller model.balance_weight"
        )
    results = adapt_all(config, model, domains, base, found, workdir / "arms")
    write_report(config, results, workdir)
    print(f"written  {workdir}/table.csv, frontier.png, specialisation.json")


def adapt_all(config, model, domains, base, found: dict[str, Any], folder: Path) -> list[dict]:
    """Every arm: all rates on the first seed, the best of them on every seed."""
    scores = score_files.scores_of(found["scores"][config.target], "the study's scores")
    arms = arms_of(config, scores)
    token = arms["esft_token"]
    assert token is not None
    equal = tree.num_params(split_params(base, model, token)[0])
    bench = Bench(config, model, domains, base, equal_rank(base, equal))
    results = [bench.run("frozen", None, 0.0, 0, folder)]
    for arm, chosen in arms.items():
        tried = [bench.run(arm, chosen, rate, config.seeds[0], folder) for rate in config.rates]
        best = min(
            tried, key=lambda r: target_and_others(r["losses"]["validation"], config.target)[0]
        )
        for seed in config.seeds:
            result = bench.run(arm, chosen, best["rate"], seed, folder)
            results.append(result)
            mine, others = target_and_others(result["losses"]["test"], config.target)
            print(
                f"{arm:12} rate {best['rate']:g} seed {seed}: {config.target} {mine:.4f}, others "
                f"{others:.4f}, {result['trained_params']:,} trained", flush=True
            )
    return results


def _sizes(model: ModelConfig) -> str:
    total, active = flops.num_params(model), flops.active_params(model)
    return f"model    {total:,} parameters, {active:,} active"


def write_report(config, results: list[dict], workdir: Path) -> None:
    """table.csv and frontier.png; the random draws are one arm, every draw and seed a point."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        arm = "random" if result["arm"].startswith("random_") else result["arm"]
        groups.setdefault(arm, []).append(result)
    rows = []
    for arm, group in groups.items():
        points = [target_and_others(r["losses"]["test"], config.target) for r in group]
        row: dict[str, Any] = {"arm": arm, "runs": len(group), "rate": group[0]["rate"]}
        row["trained_params"] = group[0]["trained_params"]
        for name, values in zip(("target", "others"), zip(*points, strict=True), strict=True):
            row[name] = float(np.mean(values))
            row[f"{name}_half_width"] = half_width(values)
        rows.append(row)
    with (workdir / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    frontier_plot(rows, config.target).savefig(workdir / "frontier.png", dpi=130)


def half_width(values) -> float:
    """Half of the 95 % interval of the mean over runs (Student's t; above 6 runs 1.96)."""
    if len(values) < 2:
        return 0.0
    t = T_95[len(values) - 2] if len(values) - 2 < len(T_95) else 1.96
    return float(t * np.std(values, ddof=1) / np.sqrt(len(values)))


if __name__ == "__main__":
    cli.run(main)
