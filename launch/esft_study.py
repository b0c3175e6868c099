"""The study of ESFT at a size that two cores can train (arXiv 2407.01906 is about 16B).

    python -m launch.esft_study --config=configs/esft/study.py --workdir=runs/esft_study

A small mixture of experts is pre-trained on five domains; if its experts have specialised, it is
adapted to one of them by full fine-tuning, LoRA of equally many parameters, ESFT by token and gate
scores, and, of the same counts, experts by gradients and at random, each at the best of the same
learning rates and over seeds. WORKDIR gets every run's raw losses (arms/ARM/RATE/SEED/result.json),
specialisation.json, and, made from them, study.json, table.md and plots/. Started again it goes on
where it was; once the base is trained, several processes of the same command share the runs
(`taskset -c 0`, `taskset -c 1`: two of one core each are faster than one of two).
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from launch import cli
from launch.esft_domains import load_domains
from launch.esft_lab import (
    FREE,
    Bench,
    arms_of,
    equal_rank,
    model_of,
    pretrained,
    specialisation,
)
from launch.esft_study_report import method_of, target_and_others, write_report
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic
from moejax.methods import score_files
from moejax.methods.esft import split_params
from moejax.models import flops
from moejax.models.config import ModelConfig
from moejax.train.loop import claim_folder

CONFIG = config_flags.DEFINE_config_file("config", "configs/esft/study.py", "The study's settings.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study; resumed if it is there.")


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
    claim_folder(workdir, config.to_dict(), "study_config.json", free=FREE)
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
    adapt_all(config, model, domains, base, found, workdir)
    print(f"written  {workdir}/study.json, table.md, plots/, specialisation.json")


def adapt_all(config, model, domains, base, found: dict[str, Any], workdir: Path) -> None:
    """Every method at all rates on the first seed, then the best rate of each on every seed.

    Random experts are tried by their first draw, so that every method has as many trials. The
    report is written anew as soon as a seed is done.
    """
    scores = score_files.scores_of(found["scores"][config.target], "the study's scores")
    trained = arms_of(config, scores)
    token = trained["esft_token"]
    assert token is not None
    equal = tree.num_params(split_params(base, model, token)[0])
    arms = {"frozen": None} | trained
    bench = Bench(config, model, domains, base, equal_rank(base, equal), workdir / "arms", arms)
    first, *_ = seeds = config.seeds
    methods: dict[str, str] = {}
    for arm in trained:
        methods.setdefault(method_of(arm), arm)
    wanted = [(arm, rate, first) for arm in methods.values() for rate in config.rates]
    later = len(seeds) * len(trained) - len(methods)
    say = _Told(1 + len(wanted) + later, config.target)
    results = bench.run_all([("frozen", 0.0, 0)], say)
    tried: dict[str, list[dict]] = {}
    for result in bench.run_all(wanted, say):
        tried.setdefault(method_of(result["arm"]), []).append(result)

    def loss(result) -> float:
        return target_and_others(result["losses"]["validation"], config.target)["target"]

    rates = {method: min(found, key=loss)["rate"] for method, found in tried.items()}
    for method, rate in rates.items():
        edge = {min(config.rates): "lowest", max(config.rates): "highest"}.get(rate)
        if edge:
            print(f"note     {method} is best at {rate:g}, the {edge} rate tried: --config.rates "
                  "may be widened, what is done is kept", flush=True)
    for seed in seeds:
        results += bench.run_all([(arm, rates[method_of(arm)], seed) for arm in trained], say)
        write_report(tried, results, found, config.target, workdir)


class _Told:
    """Says each run as it is done, with the time that the rest will take."""

    def __init__(self, total: int, target: str) -> None:
        self.total, self.target = total, target
        self.seconds: list[float] = []
        self.said: set[tuple] = set()

    def __call__(self, result: dict[str, Any]) -> None:
        run = result["arm"], result["rate"], result["seed"]
        if run in self.said:
            return
        self.said.add(run)
        self.seconds.append(result["seconds"])
        done = len(self.seconds)
        rest = datetime.timedelta(seconds=round(sum(self.seconds) / done * (self.total - done)))
        mean = target_and_others(result["losses"]["test"], self.target)
        what = f"{result['arm']} rate {result['rate']:g} seed {result['seed']}"
        print(
            f"[{done}/{self.total}] {what}: {self.target} {mean['target']:.4f}, others "
            f"{mean['others']:.4f}, {result['trained_params']:,} trained, "
            f"{result['seconds']:.0f} s  ETA {rest}", flush=True
        )


def _sizes(model: ModelConfig) -> str:
    total, active = flops.num_params(model), flops.active_params(model)
    return f"model    {total:,} parameters, {active:,} active"


if __name__ == "__main__":
    cli.run(main)
