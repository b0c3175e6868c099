"""`launch.shadow --stage=collect`: the importance of every head and neuron, text by text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax

from launch.shadow_data import Model, Sample, claim, identity, load_model, load_samples
from moejax.core.errors import InputError
from moejax.io import atomic
from moejax.methods import shadow_traces
from moejax.methods.shadow_dejavu import fires
from moejax.methods.shadow_measure import Asked, measure, slots_for

SECTIONS = ("model", "data", "collect")
POOLED = "pooled_{:05d}.npz"


def main(values: dict[str, Any]) -> None:
    """Collects what is missing of RUN/traces."""
    config = values["config"]
    asked = _asked(config, curvature=True)
    model = load_model(config)
    samples = load_samples(config, model.tokenizer)
    prompts = sum(sample.text.prompt for sample in samples)
    tokens = sum(len(sample.text.tokens) for sample in samples)
    print(
        f"texts    {len(samples)} ({sum(s.heldout for s in samples)} held out), {prompts:,} tokens "
        f"of prompts, {tokens - prompts:,} after them"
    )
    if values["dry_run"]:
        print(
            f"criteria {', '.join(asked.criteria)}\ndry run: nothing read through, nothing written"
        )
        return
    folder = Path(values["workdir"]) / "traces"
    claim(folder, "collect.json", identity(config, SECTIONS, model), samples)
    size = config.collect.part
    numbers = range(-(-len(samples) // size))
    began, done = time.perf_counter(), 0
    for number in numbers:
        if shadow_traces.part_path(folder, number).exists():
            continue
        part = list(enumerate(samples))[number * size : (number + 1) * size]
        num_bytes = _collect_part(model, part, folder, number, config)
        done += len(part)
        rate = done / (time.perf_counter() - began)
        left = (len(samples) - (number + 1) * size) / rate
        print(
            f"collect  {min((number + 1) * size, len(samples))}/{len(samples)} texts, "
            f"{rate:.2f}/s, {max(left, 0) / 60:.0f} min left, {num_bytes / len(part) / 1e3:.0f} kB "
            "a text",
            flush=True,
        )
    _report(folder, model)


def pooled(folder: Path, samples: list[Sample], part: int, heldout: bool = False):
    """Exact sums of scores over all texts that are held out, or over those that are not."""
    total, prefix = shadow_traces.Pooled(), "heldout/" if heldout else "train/"
    for number in range(-(-len(samples) // part)):
        path = folder / POOLED.format(number)
        if not path.exists():
            raise InputError(f"{folder} is not complete: run --stage=collect to its end")
        arrays = atomic.read_npz(path, lambda name: name.startswith(prefix))
        mine = {name.removeprefix(prefix): array for name, array in arrays.items()}
        total.merge(shadow_traces.Pooled.of_arrays(mine))
    return total


def _asked(config, curvature: bool) -> Asked:
    c = config.collect
    names = tuple(n for n in c.criteria if curvature or n != "grasp")
    return Asked(names, c.parity, c.rows)


def _collect_part(model: Model, part, folder: Path, number: int, config) -> int:
    """One file of traces, and the exact sums of its texts beside it."""
    loaded, found = model.loaded, []
    sums = {"train": shadow_traces.Pooled(), "heldout": shadow_traces.Pooled()}
    for at, sample in part:
        asked = _asked(config, curvature=False)
        slots = slots_for(len(sample.text.tokens), config.data.slots)
        one = measure(loaded.params, loaded.config, sample.text, asked, slots)
        one = jax.device_get(one)
        found.append(one)
        where = sums["heldout" if sample.heldout else "train"]
        where.add(one)
        if at < config.collect.curvature_texts and "grasp" in config.collect.criteria:
            asked = Asked(("grasp",), config.collect.parity)
            more = measure(loaded.params, loaded.config, sample.text, asked, slots)
            where.add(jax.device_get({n: more[n] for n in ("heads", "neurons")}))
    arrays = shadow_traces.pack(found, [at for at, _ in part], fires(loaded.config))
    both = {f"{side}/{n}": a for side, pool in sums.items() for n, a in pool.arrays().items()}
    atomic.write_npz(folder / POOLED.format(number), both)
    return shadow_traces.write_part(folder, number, arrays)


def _report(folder: Path, model: Model) -> None:
    files = list(shadow_traces.parts(folder))
    arrays = atomic.read_npz(files[0])
    names = [n for n in arrays if n.startswith(("heads/", "neurons/", "largest/"))]
    traces = sum(arrays[n].nbytes for n in names) / len(arrays["text"])
    rows = sum(arrays[n].nbytes for n in arrays if n.startswith("rows/")) / len(arrays["text"])
    plain = sum(4 * arrays[n][0].size for n in names if not n.startswith("largest/"))
    total = sum(path.stat().st_size for path in files)
    kept = len([n for n in names if n.startswith("heads/")])
    print(
        f"kept     {total / 1e6:.1f} MB in {len(files)} files; a text {traces / 1e3:.1f} kB of "
        f"{kept} criteria ({plain / 1e3:.0f} kB in float32) and {rows / 1e3:.0f} kB that DejaVu "
        f"learns from\nwritten  {folder}"
    )
