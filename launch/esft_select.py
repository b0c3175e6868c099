"""launch.esft --stage=select: scores -> the experts to train."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io.load import load_any, main_dtype
from moejax.methods import expert_config, expert_selection, score_files
from moejax.methods.expert_config import ExpertConfig
from moejax.methods.expert_selection import ExpertScores

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}
_WAYS = ("threshold", "count", "counts_from", "byte_budget")


def main(flags: dict[str, Any]) -> None:
    """Reads scores, chooses, prints what was chosen and writes it."""
    out = Path(flags["out"])
    if out.exists() and not flags["overwrite"]:
        raise InputError(f"{out} exists: choose another name or pass --overwrite")
    _check_way(flags)
    scores, source = score_files.read_scores(flags["scores"], flags["top_k"])
    decimals = flags["round_decimals"]
    scores = scores.rounded(None if decimals < 0 else decimals)
    model = load_any(flags["model"], abstract=True) if flags["model"] else None
    if model is not None:
        _check_model(scores, model, source)
    chosen = choose(scores, flags, model)
    if flags["random_seed"] is not None:
        counts = expert_selection.counts_of(chosen)
        chosen = expert_selection.select_random(scores, counts, flags["random_seed"])
    switches = {name: flags[name] for name in ("shared_experts", "non_expert_modules")}
    chosen = dataclasses.replace(chosen, **switches)
    print(f"scores   {source}: {len(scores.layers)} layers x {len(scores.experts)} experts")
    for line in describe(scores, flags["score"], chosen):
        print(line)
    if flags["score"] == "gate":
        print("note     for gate scores the paper's authors published no config to compare with")
    if flags["dry_run"]:
        print("dry run: nothing written")
        return
    expert_config.write(out, chosen)
    print(f"written  {out}")


def choose(scores: ExpertScores, flags: dict[str, Any], model) -> ExpertConfig:
    """The experts by whichever way the flags name."""
    name = flags["score"]
    if flags["byte_budget"] is not None:
        budget = num_bytes(flags["byte_budget"])
        limit = 1.0 if flags["threshold"] is None else flags["threshold"]
        budget -= shared_bytes(model) if flags["shared_experts"] else 0
        return expert_selection.select_by_bytes(scores, name, budget, expert_bytes(model), limit)
    if flags["count"] is not None:
        return expert_selection.select_by_count(scores, name, flags["count"])
    if flags["counts_from"] is not None:
        other = expert_config.read(flags["counts_from"])
        strange = sorted(set(other.experts) - set(scores.layers))
        if strange:
            raise InputError(
                f"{flags['counts_from']} has layer {strange[0]} and the scores have layers "
                f"{min(scores.layers)} to {max(scores.layers)}: they are of different models"
            )
        return expert_selection.select_by_count(scores, name, expert_selection.counts_of(other))
    return expert_selection.select_by_threshold(scores, name, flags["threshold"])


def describe(scores: ExpertScores, name: str, chosen: ExpertConfig) -> list[str]:
    """How many experts were chosen, where, and what share of the score they hold."""
    counts = expert_selection.counts_of(chosen)
    mass = expert_selection.mass_of(scores, name, chosen)
    total = len(scores.layers) * len(scores.experts)
    number = sum(counts.values())
    return [
        f"chosen   {number} of {total} experts ({number / total:.1%}), "
        f"{min(counts.values())} to {max(counts.values())} a layer, mean "
        f"{number / len(counts):.1f}; {name} score of a layer's "
        f"{np.mean(list(mass.values())):.3f} on average, {min(mass.values()):.3f} to "
        f"{max(mass.values()):.3f}"
    ]


def num_bytes(text: str) -> int:
    """Bytes of "2.57GB", "300MiB" or "1000"; InputError for anything else."""
    found = re.fullmatch(r"([0-9.]+)\s*([a-zA-Z]*)", text.strip())
    if not found or found[2].lower() not in _UNITS or found[1].count(".") > 1:
        raise InputError(f"{text!r} is no amount of bytes: write it as 2.57GB, 300MiB or 1000")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def expert_bytes(model) -> int:
    """Bytes of one expert, as the model is stored."""
    experts, _ = tree.split(model.params, "layers/*/moe/experts/*")
    stacks = tree.flatten(experts).values()
    runs = {path.split("/")[1] for path in tree.flatten(experts)}
    size = sum(np.prod(leaf.shape[2:], dtype=np.int64) for leaf in stacks) // len(runs)
    return int(size) * main_dtype(model.params).itemsize


def shared_bytes(model) -> int:
    """Bytes of all shared experts: networks beside the routed ones, or XFT's expert 0."""
    networks, _ = tree.split(model.params, "layers/*/moe/shared/*")
    layers = len(expert_config.moe_layers(model.config))
    return tree.num_bytes(networks) + model.config.moe.num_shared * layers * expert_bytes(model)


def _check_way(flags: dict[str, Any]) -> None:
    given = [name for name in _WAYS if flags[name] is not None]
    if not given or (len(given) > 1 and set(given) != {"threshold", "byte_budget"}):
        raise InputError(
            f"give one of --{', --'.join(_WAYS)} (a budget may have a threshold), "
            f"not {len(given)} of them"
        )
    if flags["threshold"] is not None:
        expert_selection.check_threshold(flags["threshold"])
    if flags["byte_budget"] is not None and not flags["model"]:
        raise InputError("--byte_budget needs --model, whose experts' size it counts in")


def _check_model(scores: ExpertScores, model, source: str) -> None:
    config = model.config
    if config.moe is None:
        raise InputError(f"{model.source} is dense and has no experts to select: upcycle it first")
    layers = list(expert_config.moe_layers(config))
    experts = list(range(config.moe.num_shared, config.moe.num_experts))
    if sorted(scores.layers) != layers or list(scores.experts) != experts:
        raise InputError(
            f"{source} has {len(scores.layers)} layers from {min(scores.layers)} on of "
            f"{len(scores.experts)} experts, the model {len(layers)} from {layers[0]} on of "
            f"{len(experts)}: these are scores of another model"
        )
