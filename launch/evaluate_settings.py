"""What one evaluation was asked, and what all kinds of evaluation share."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from launch.mesh_text import parse_mesh
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.platform import versions
from moejax.evals import scores
from moejax.evals.samples import read_partial, write_samples
from moejax.evals.sandbox import Limits
from moejax.evals.tasks import Task
from moejax.io import lineage, prompt_forms
from moejax.io.atomic import read_json, write_json
from moejax.io.load import Loaded, find_source, load_any
from moejax.io.sharded import on_mesh
from moejax.models.transformer import ForwardOptions

CLAIM = "evaluate.json"  # in the folder: whose it is
PARTIAL = "samples.partial.jsonl"  # in the folder while the run goes on
console = Console(highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags of launch.evaluate, checked."""

    task: str
    model: str | None
    out: Path
    samples: Path | None = None
    data: str | None = None
    num: int | None = None
    form: str | None = None
    num_samples: int = 1
    ks: tuple[int, ...] | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int | None = None
    seq_len: int = 512
    shots: int = 0
    shots_data: str | None = None
    limits: Limits = Limits()
    package_folders: tuple[str, ...] = ()
    partial: bool = False
    execute: bool = False
    overlap: str | None = None
    grader: str | None = None
    versus: Path | None = None
    dry_run: bool = False
    dtype: str = "float32"
    mesh: str | None = None

    @property
    def options(self) -> ForwardOptions:
        """How to compute."""
        return ForwardOptions(compute_dtype=self.dtype)


# What was measured: the run's settings, its records and its result; None after a dry run.
Outcome = tuple[dict[str, Any], Sequence[Mapping[str, Any]], dict[str, Any]]


def write_run(settings: Settings, outcome: Outcome, began: float) -> None:
    """Writes samples.jsonl and result.json, each whole."""
    asked, records, result = outcome
    write_samples(settings.out / "samples.jsonl", records)
    (settings.out / PARTIAL).unlink(missing_ok=True)
    whole = {**asked, **result, "model_xxh3": model_hash(settings.model)}
    wall_s = round(time.perf_counter() - began, 2)
    write_json(settings.out / "result.json", {**whole, "wall_s": wall_s} | environment())
    console.print(f"results: {settings.out / 'result.json'}", markup=False)




def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    machine = {
        "python": platform.python_version(),
        **versions("moejax", "jax", "flax", "numpy"),
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
    }
    return {"environment": machine, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def model_hash(source: str | None) -> str | None:
    """XXH3 of the weights that were judged, None where samples were made elsewhere."""
    return None if source is None else lineage.hash_path(find_source(source))


def load_model(settings: Settings) -> Loaded:
    """The model on the device, or split over a mesh of all of them."""
    assert settings.model is not None
    place = on_mesh(parse_mesh(settings.mesh)) if settings.mesh else None
    loaded = load_any(settings.model, settings.dtype, place=place)
    if loaded.tokenizer is None:
        raise InputError(f"{settings.model} has no tokenizer, so it cannot be asked anything")
    if place is not None:
        return loaded
    return dataclasses.replace(loaded, params=jax.device_put(loaded.params))


def overlap_of(settings: Settings) -> dict[str, float]:
    """Per problem its overlap with training data, empty where that was not measured.

    Raises:
      InputError: a file that launch.decontaminate did not write, or without this task.
    """
    if settings.overlap is None:
        return {}
    found = read_json(settings.overlap)
    try:
        return dict(found["benchmarks"][settings.task]["shares"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{settings.overlap} has no overlap of task {settings.task}: run launch.decontaminate "
            f"with --benchmarks={settings.task}=..."
        ) from error


def about_overlap(
    settings: Settings, shares: Mapping[str, float], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """For the result: what was looked for where, and the score on what shares nothing."""
    if settings.overlap is None:
        return {"decontamination": None}
    found = read_json(settings.overlap)
    kept = {name: found[name] for name in ("n", "least", "data", "num_texts")}
    counted = {k: v for k, v in found["benchmarks"][settings.task].items() if k != "shares"}
    clean = [r for r in records if shares.get(r["id"]) == 0 and r["passed"] is not None]
    passed = sum(bool(record["passed"]) for record in clean)
    score = {"num_clean": len(clean), "score_clean": passed / len(clean) if clean else None}
    return {"decontamination": {**kept, **counted, **score}}


def compared(settings: Settings, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For the result: the paired difference to another model's run, said on the console too.

    Raises:
      InputError: that run has other problems.
    """
    if settings.versus is None:
        return {}
    other = read_partial(settings.versus / "samples.jsonl")
    try:
        found = scores.compare([dict(record) for record in records], other)
    except (KeyError, ValueError) as error:
        raise InputError(f"--versus={settings.versus} cannot be compared: {error}") from error
    low, high = found["interval"]
    console.print(
        f"minus {settings.versus}: {found['difference']:+.3f} [{low:+.3f}, {high:+.3f}], "
        f"{found['verdict']}; p = {found['p_flip']:.3g} (randomisation test)",
        markup=False,
    )
    return {"versus": {"folder": str(settings.versus), **found}}


def form_of(settings: Settings, task: Task) -> str:
    """The prompt form: --form, else what the model's folder says of this task, else its first.

    A model folder may hold prompt_forms.json, as {"humaneval": "fence"}: how it is to be asked.

    Raises:
      InputError: a form that the task has not.
    """
    if settings.form is not None or settings.model is None:
        return task.form(settings.form)
    path = find_source(settings.model)
    try:
        return task.form(prompt_forms.of(path).get(settings.task))
    except InputError as error:
        raise InputError(f"{path / prompt_forms.FILE}: {error}") from error


def describe(loaded: Loaded) -> None:
    """One line about a model."""
    config = loaded.config
    console.print(
        f"model: {config.num_layers} layers of width {config.d_model}, "
        f"{tree.num_params(loaded.params):,} parameters, "
        f"{tree.num_bytes(loaded.params) / 2**30:.2f} GiB",
        markup=False,
    )
