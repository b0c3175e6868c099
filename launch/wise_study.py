"""The study of WiSE-FT at a size that two cores can train (arXiv 2504.10478 is about 0.5B to 2B).

    python -m launch.wise_study --config=configs/wise/study.py --workdir=runs/wise_study

Countdown problems (moejax/data/countdown.py): a small model is pre-trained on many noisy
derivations, then tuned for many epochs on few problems with one derivation each. Per seed of the
tuning: Pass@1 and Pass@k along it; then, on test problems, the late checkpoint, early ones, their
interpolations (early checkpoint and delta chosen on validation problems), temperatures and cuts,
EMA, LAWA, the late model with its learning rate decayed to zero, and GRPO from the late and from
the interpolated model. WORKDIR gets seed_N/ with every sample, table.csv, study.json, table.md and
plots/. Stopped and started again it goes on where it was.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import config_flags

from launch import cli
from launch.wise_arms import measure_seed
from launch.wise_study_report import write_report
from launch.wise_training import Lab, pretrained
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.data import countdown
from moejax.train.loop import claim_folder

CONFIG = config_flags.DEFINE_config_file("config", "configs/wise/study.py", "The study's settings.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study; resumed if it is there.")


def main(argv) -> None:
    del argv
    config = CONFIG.value
    lab = Lab.of(config)
    say = functools.partial(print, flush=True)
    guess = countdown.guess_rate([p for p, _ in lab.test], 50)
    say(f"model    {tree.num_params(lab.abstract):,} parameters, {lab.model.num_layers} layers")
    say(
        f"data     {len(lab.tune)} problems to tune on, {len(lab.validation)} to choose on, "
        f"{len(lab.test)} to report on; a guess with right arithmetic passes {guess:.1%}"
    )
    if cli.DRY_RUN.value:
        say("dry run: nothing trained, nothing written")
        return
    if WORKDIR.value is None:
        raise InputError("--workdir is missing: name the folder that the study is kept in")
    workdir = Path(WORKDIR.value)
    claim_folder(workdir, config.to_dict(), "study_config.json", free=["seeds"])
    base = pretrained(lab, config, workdir / "pretrain")
    facts, seeds = {"guess": guess, "derivations": _num_derivations(lab)}, []
    for seed in config.seeds:
        seeds.append(measure_seed(lab, config, base, seed, workdir / f"seed_{seed}", say))
        write_report(config, seeds, facts, workdir)  # of those that are done
    say(f"written  {workdir}/study.json, table.csv, table.md, plots/")


def _num_derivations(lab: Lab) -> float:
    """The median number of derivations that solve a test problem."""
    return float(np.median([len(countdown.derivations(p)) for p, _ in lab.test]))


if __name__ == "__main__":
    cli.run(main)
