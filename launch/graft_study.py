"""The study of LLM Modules at a size that two cores can train (arXiv 2502.08213 is 1.5B + 125M).

    python -m launch.graft_study --config=configs/graft_study.py --workdir=runs/graft_study
    python -m launch.graft_study --config=... --workdir=... --stage=report

A small target is pre-trained on the validation part of WikiText-2. The source reads the test part
once; its states are kept. Then, per seed, from the same target on the same texts with equally many
parameters: adapters alone, the bridge, the bridge with another text's states, distillation by
forward and reverse KL, on the student's own texts (GKD, once) and of hidden states, the paper's
layers as published and with a causal mask, and adapters and bridge in a target with a tokenizer of
its own. WORKDIR/arms/ARM/seed_N/result.json keeps every text's score; table.csv, study.json and
plots/ are made from them, by --stage=report from what there is so far. Started again it goes on.
"""

from __future__ import annotations

import functools
import shutil
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from launch import cli
from launch.graft_lab import Lab, source_name
from launch.graft_loss import trained_parts
from launch.graft_scores import free_score, predictor, score, source_predictor
from launch.graft_setup import Setup, cache_states, state_identity
from launch.graft_study_report import write_report
from launch.graft_train import fit_method
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.memory import give_back
from moejax.io import atomic
from moejax.io.load import load_any
from moejax.io.states import States
from moejax.train.loop import claim_folder

CONFIG = config_flags.DEFINE_config_file("config", "configs/graft_study.py", "Its settings.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the study; resumed if it is there.")
STAGE = flags.DEFINE_enum("stage", "run", ("run", "report"), "report: the table of what is done.")


def main(argv) -> None:
    del argv
    config = CONFIG.value
    say = functools.partial(print, flush=True)
    if WORKDIR.value is None and not cli.DRY_RUN.value:
        raise InputError("--workdir is missing: name the folder that the study is kept in")
    workdir = Path(WORKDIR.value or ".")
    if STAGE.value == "report" and not cli.DRY_RUN.value:
        write_report(config, workdir, say)
        return
    lab = Lab.of(config, workdir)
    sizes = tree.num_params(lab.source.params), len(lab.texts), lab.num_heldout
    say("source   {:,} parameters; {:,} texts, the last {:,} held out".format(*sizes))
    if cli.DRY_RUN.value:
        say("dry run: nothing trained, nothing written")
        return
    free = ["seeds", "arms", "once", "gap", "words"]
    claim_folder(workdir, config.to_dict(), "study_config.json", free=free)
    before(lab, say)
    runs = [(arm, seed) for seed in config.seeds for arm in config.arms]
    for arm, seed in [*runs, *((arm, config.seeds[0]) for arm in config.once)]:
        if not (workdir / "arms" / arm / f"seed_{seed}" / "result.json").is_file():
            measure(lab, arm, seed, say)
    write_report(config, workdir, say)


def before(lab: Lab, say) -> None:
    """States on disk, and the gap: the source alone and the target before any arm."""
    path, began = lab.workdir / "before.json", time.monotonic()
    setup = lab.setup("bridge", 0)
    examples = lab.examples(setup)
    tokens = sum(len(e.source_ids) for e in examples)
    done = [0]

    def progress(number: int, total: int) -> None:
        if number * 20 // total > done[0]:
            done[0] = number * 20 // total
            rate = number / (time.monotonic() - began)
            say(f"states   {number} of {total} texts, {(total - number) / rate:.0f} s to go")

    cache_states(setup, examples, lab.workdir / "states", progress)
    if not path.is_file():
        heldout, first = _heldout(lab, examples)
        states = _states(lab, setup, examples)
        head = {n: v for n, v in setup.source_params().items() if n in ("embed", "lm_head")}
        found: dict[str, Any] = {"source_tokens": tokens, "cache_s": time.monotonic() - began}
        found["source"] = score(setup, source_predictor(setup, head), heldout, states, first)
        found["source_all"] = _all_ids(lab, setup, heldout, states, first)
        for arm in ("adapter", "own_adapter"):
            if arm == "adapter" or "own_bridge" in lab.config.arms:
                one = lab.setup(arm, 0)
                rows = lab.examples(one)
                shut = _untrained(one)
                scores = score(one, shut, _heldout(lab, rows)[0], states, first)
                found["target" if arm == "adapter" else "own_target"] = scores
        atomic.write_json(path, found)
    found = atomic.read_json(path)
    bits = {n: sum(found[n]["bits"]) / sum(found[n]["bytes"]) for n in ("source", "target")}
    gap = 1 - bits["source"] / bits["target"]
    say(
        f"gap      source {bits['source']:.3f}, target {bits['target']:.3f} bits per byte: "
        f"{gap:.1%} fewer; {tokens:,} source tokens"
    )
    if gap < lab.config.gap:
        raise InputError(
            f"the source's bits per byte beat the target's by {gap:.1%}, less than "
            f"{lab.config.gap:.0%}: choose other texts, or a smaller target"
        )


def _all_ids(lab: Lab, setup: Setup, heldout, states: States, first: int) -> dict[str, Any]:
    """The source's bits with its head as it came, all of its ids possible."""
    whole = load_any(source_name(lab.config), "float32").params
    kept = atomic.read_npy(lab.workdir / "kept_ids.npy")
    head = jax.device_put({n: v for n, v in whole.items() if n in ("embed", "lm_head")})
    predict = source_predictor(setup, head)
    scores = score(
        setup, lambda rows: predict(rows | {"tokens": kept[rows["tokens"]]}), heldout, states, first
    )
    return {name: scores[name] for name in ("bits", "bytes")}


def _untrained(setup: Setup):
    """The target as it came: adapters that change nothing yet."""
    loaded = load_any(setup.config.target.model, "float32")
    return predictor(setup, *trained_parts(setup, loaded.params))


def _heldout(lab: Lab, examples) -> tuple[list, int]:
    first = len(examples) - lab.num_heldout
    return examples[first:], first


def _states(lab: Lab, setup: Setup, examples) -> States:
    return States(lab.workdir / "states", state_identity(setup, examples), len(examples))


def measure(lab: Lab, arm: str, seed: int, say) -> None:
    """Trains one arm and scores it; raw scores of every held-out text are kept."""
    began = time.monotonic()
    folder = lab.workdir / "arms" / arm / f"seed_{seed}"
    setup = lab.setup(arm, seed)
    examples = lab.examples(setup)
    heldout, first = _heldout(lab, examples)
    states = _states(lab, setup, examples)
    loaded = load_any(setup.config.target.model, "float32")
    data = (examples[:first], states)
    result = fit_method(setup, loaded.params, data, folder / "run", None, say)
    trained_s = time.monotonic() - began
    predict = predictor(setup, jax.device_put(result.params), {})
    found: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "trained_params": tree.num_params(result.params),
        "scores": score(setup, predict, heldout, states, first),
        "train_s": trained_s,
    }
    if arm.startswith("paper"):
        found["causal"] = score(setup, predict, heldout, states, first, causal=True)
        found["free"] = free_score(setup, predict, heldout, states, first, lab.config.words)
    atomic.write_json(folder / "result.json", found)
    shutil.rmtree(folder / "run" / "ckpt", ignore_errors=True)
    scores = found["scores"]
    bits = sum(scores["bits"]) / sum(scores["bytes"])
    right = sum(scores["right"]) / max(sum(scores["words"]), 1)
    say(
        f"{arm:12} seed {seed}: {bits:.4f} bits per byte, first words {right:.1%}, "
        f"{found['trained_params']:,} trained, {time.monotonic() - began:.0f} s"
    )
    give_back()


if __name__ == "__main__":
    cli.run(main)
