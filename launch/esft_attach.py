"""launch.esft --stage=attach: deltas into a base, out of it, and out of tuned models."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic, lineage
from moejax.io.hf import has_class
from moejax.io.load import Loaded, load_any, save_any
from moejax.methods import adapter_files, esft_delta, expert_config
from moejax.methods.esft_delta import Delta


def main(flags: dict[str, Any]) -> None:
    """Attaches --delta to --base; --remove takes it out; --extract makes one of a tuned model."""
    if flags["extract"]:
        _extract(flags)
    elif flags["remove"]:
        _remove(flags)
    else:
        _attach(flags)


def _attach(flags: dict[str, Any]) -> None:
    base, delta = _base_and_delta(flags)
    params = esft_delta.insert(base.params, base.config, delta)
    _save(flags, dataclasses.replace(base, params=params), "esft_attach", [flags["base"]])


def _remove(flags: dict[str, Any]) -> None:
    _need(flags, "model", "--remove takes a delta out of a model")
    base, delta = _base_and_delta(flags)
    model = load_any(flags["model"])
    if model.config != base.config:
        raise InputError(f"{flags['model']} and {flags['base']} are models of different sizes")
    there = esft_delta.extract(model.params, model.config, delta.chosen)
    for path, value in {**there.stacks, **there.leaves}.items():
        wanted = {**delta.stacks, **delta.leaves}[path]
        if not np.array_equal(value, np.asarray(wanted).astype(value.dtype)):
            raise InputError(
                f"{flags['model']} does not hold the delta of {flags['delta']} at {path}: it was "
                "never attached, or the model was trained since"
            )
    original = esft_delta.extract(base.params, base.config, delta.chosen)
    params = esft_delta.insert(model.params, model.config, original)
    same = tree.diff(params, base.params) == []
    print(f"check    {'equal to the base, bit for bit' if same else 'the base and other deltas'}")
    _save(flags, dataclasses.replace(model, params=params), "esft_remove", [flags["model"]])


def _extract(flags: dict[str, Any]) -> None:
    _need(flags, "model", "--extract makes a delta of a tuned model")
    _need(flags, "experts", "--extract needs to know the experts")
    atomic.check_target(flags["out"], flags["overwrite"])
    chosen = expert_config.read(flags["experts"])
    base, model = load_any(flags["base"]), load_any(flags["model"])
    chosen.check_fits(base.config, flags["experts"])
    delta = esft_delta.extract(model.params, model.config, chosen)
    elsewhere = tree.diff(esft_delta.insert(base.params, base.config, delta), model.params)
    if elsewhere:
        raise InputError(
            f"{flags['model']} differs from {flags['base']} beyond the named experts, in "
            f"{elsewhere[0]}: such a model is no delta of these experts"
        )
    delta = dataclasses.replace(delta, base_sha256=lineage.hash_params(base.params))
    describe(delta, base)
    if flags["dry_run"]:
        print("dry run: nothing written")
        return
    read = [lineage.input_of(flags[name]) for name in ("base", "model")]
    operations = lineage.append(base.lineage, "esft_extract", read, chosen.to_json())
    adapter_files.write(flags["out"], delta, base.config, operations, flags["overwrite"])
    print(f"written  {flags['out']}")


def _base_and_delta(flags: dict[str, Any]) -> tuple[Loaded, Delta]:
    """Both, checked against each other before anything is written."""
    _need(flags, "delta", "attaching needs a delta")
    atomic.check_target(flags["out"], flags["overwrite"])
    plan = load_any(flags["base"], abstract=True)
    delta = adapter_files.read(flags["delta"], plan.config)
    base = load_any(flags["base"])
    esft_delta.check_base(base.params, delta, flags["delta"])
    if not delta.base_sha256:
        print("note     the delta does not say which base it was trained from: only sizes checked")
    describe(delta, base)
    return base, delta


def describe(delta: Delta, base: Loaded) -> None:
    """Prints what a delta holds, beside the whole model."""
    whole = tree.num_bytes(base.params)
    print(
        f"delta    {len(delta.chosen.pairs)} experts, {len(delta.leaves)} other parts: "
        f"{delta.num_bytes / 1e6:,.1f} MB, {delta.num_bytes / whole:.1%} of the model's "
        f"{whole / 1e6:,.1f} MB"
    )


def _save(flags: dict[str, Any], loaded: Loaded, name: str, sources: list[str]) -> None:
    if flags["dry_run"]:
        print("dry run: nothing written")
        return
    read = [lineage.input_of(source) for source in [*sources, flags["delta"]]]
    operations = lineage.append(loaded.lineage, name, read)
    form = flags["format"] or ("hf" if has_class(loaded.config) else "orbax")
    loaded = dataclasses.replace(loaded, lineage=operations, tensors=None)
    save_any(loaded, flags["out"], form, overwrite=flags["overwrite"])
    print(f"written  {flags['out']} ({form})")


def _need(flags: dict[str, Any], name: str, why: str) -> None:
    if not flags[name]:
        raise InputError(f"{why}: give --{name}")
