"""Why tuning loses diversity, on two problems small enough to be exact (WiSE-FT, arXiv 2504.10478).

    python -m launch.collapse --out=runs/collapse

Bandit: a softmax policy over arms of which some earn 1 and the rest 0.
  exact       the exact policy gradient: good arms take all, and the likelier from the less likely,
              since an arm learns at the rate at which it is drawn
  sampled     REINFORCE, one draw a step: drifts to ONE of them by chance, though all earn the same
  kl          reward - beta * KL(policy || start): the odds between good arms stay those of the
              start, which is its closed form start * exp(r / beta): KL keeps diversity, no more
Tuning: logistic regression on separable examples, gradient descent on the cross-entropy. Its margin
grows without end, so the chance p to answer a test problem goes to 0 or 1: Pass@1 = E[p] rises,
Var(p) rises, and Pass@k of a larger k falls. Dotted: the bound 1 - ((1 - E p)^2 + Var p)^(k/2).

Writes collapse.json, collapse.csv and collapse.png. Takes seconds; no accelerator, no model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import flags

from launch import cli
from launch.collapse_problems import (
    bandit_summary,
    draw,
    exact_gradient,
    make_bandit,
    sampled_gradient,
    tune,
    tuning_table,
)
from moejax.core.errors import InputError
from moejax.io import atomic
from moejax.report.table import as_csv

OUT = flags.DEFINE_string("out", None, "Folder for the figures.", required=True)
SEED = flags.DEFINE_integer("seed", 0, "Of the start, the draws and the examples.")
BETA = flags.DEFINE_float("beta", 0.25, "Weight of the KL.")
STEPS = flags.DEFINE_integer("steps", 4000, "Of each bandit run and of the tuning.", lower_bound=10)


def main(argv) -> None:
    del argv
    if not 0 < BETA.value < np.inf:
        raise InputError(f"--beta={BETA.value} must be above 0")
    if cli.DRY_RUN.value:
        print(f"dry run: {STEPS.value} steps of three bandits and of the tuning, seconds in all")
        return
    bandit = make_bandit(seed=SEED.value)
    runs = {
        "exact": exact_gradient(bandit, STEPS.value),
        "sampled": sampled_gradient(bandit, STEPS.value, seed=SEED.value),
        "kl": exact_gradient(bandit, STEPS.value, beta=BETA.value),
    }
    table = tuning_table(*tune(STEPS.value, SEED.value))
    folder = Path(OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    summary = bandit_summary(bandit, runs, BETA.value)
    atomic.write_json(folder / "collapse.json", {"bandit": summary, "tuning": table})
    atomic.write_text(folder / "collapse.csv", as_csv(table))
    draw(bandit, runs, table).savefig(folder / "collapse.png", dpi=150)
    for name, row in summary.items():
        print(f"{name:12} good arms' share {row['good']:.3f}, of 4 used {row['used']:.2f}")
    first, last = table[0], table[-1]
    print(
        f"tuning       Pass@1 {first['pass@1']:.3f} -> {last['pass@1']:.3f}, Var(p) "
        f"{first['variance']:.3f} -> {last['variance']:.3f}, Pass@16 {first['pass@16']:.3f} -> "
        f"{last['pass@16']:.3f}"
    )
    print(f"written  {folder}/collapse.{{json,csv,png}}")


if __name__ == "__main__":
    cli.run(main)
