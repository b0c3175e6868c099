"""launch.esft --stage=score: a model and a task's data -> how much each expert is used."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn

from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.data.examples import encode_records
from moejax.data.load import DataConfig, load_data
from moejax.data.loader import fixed_batches
from moejax.data.packing import Packed, pack
from moejax.io import atomic, lineage
from moejax.io.load import Loaded, load_any
from moejax.methods import expert_scores, score_files
from moejax.methods.expert_config import moe_layers
from moejax.methods.expert_gradients import gradient_scores
from moejax.methods.expert_scores import Counted
from moejax.methods.score_stability import Stability, stability
from moejax.models.transformer import ForwardOptions
from moejax.report.esft_plots import stability_plot
from moejax.train.loss import lm_loss


def main(flags: dict[str, Any]) -> None:
    """Scores a task's data and writes a folder that --stage=select reads."""
    out = Path(flags["out"])
    atomic.check_target(out, flags["overwrite"])
    plan = load_any(flags["model"], abstract=True)
    if plan.config.moe is None:
        raise InputError(f"{flags['model']} is dense and has no experts to score: upcycle it first")
    packed, summary = rows(flags, plan)
    tokens = int((packed.segment_ids > 0).sum())
    moe = plan.config.moe
    num_layers = len(moe_layers(plan.config))
    print(
        f"model    {flags['model']}: {num_layers} layers "
        f"of {moe.num_routed} routed experts, {moe.routed_per_token} per token\n"
        f"data     {flags['data']}: {tokens:,} tokens of {sum(map(len, packed.ids))} conversations "
        f"in {len(packed.ids)} rows of {flags['seq_len']}",
        flush=True,
    )
    if flags["dry_run"]:
        print("dry run: nothing scored, nothing written")
        return
    loaded = load_any(flags["model"])
    started = time.perf_counter()
    with atomic.atomic_dir(out, flags["overwrite"]) as folder:
        counted = _count(loaded, packed, flags, folder)
        scores = counted.scores(flags["average"])
        if flags["gradients"]:
            more = {"gradient": _gradients(loaded, packed, flags)}
            scores = dataclasses.replace(scores, values={**scores.values, **more})
        atomic.write_json(folder / score_files.SUMMARY, score_files.summary_json(scores))
        curves = [
            stability(counted, name, average=flags["average"], threshold=p)
            for name, p in (("token", 0.2), ("gate", 0.1))
        ]
        _write_counts(folder / "counts.npz", counted)
        atomic.write_json(folder / "stability.json", [curve.to_json() for curve in curves])
        stability_plot(curves, counted.top_k).savefig(folder / "stability.png", dpi=130)
        read = [lineage.input_of(loaded.source)]
        args = {"average": flags["average"], "num_tokens": tokens, "data": summary}
        lineage.write(folder, lineage.append(loaded.lineage, "esft_score", read, args))
    seconds = time.perf_counter() - started
    print(f"scored   {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)")
    for curve in curves:
        print(describe_stability(curve, counted.top_k))
    print(f"written  {out}")


def rows(flags: dict[str, Any], plan: Loaded) -> tuple[Packed, dict[str, Any]]:
    """The task's packed rows up to --num_tokens, and what they are for the record."""
    if plan.tokenizer is None:
        raise InputError(f"{plan.source} has no tokenizer: give a model with one")
    share = flags["heldout_share"]
    data = load_data(DataConfig(source=flags["data"], heldout_share=share, seed=flags["seed"]))
    examples, total = [], 0
    for example in encode_records(data.train, plan.tokenizer):
        examples.append(example)
        total += min(len(example.ids), flags["seq_len"])
        if 0 < flags["num_tokens"] <= total:
            break
    packed = pack(examples, flags["seq_len"], plan.tokenizer.pad_id, "truncate")
    return packed, data.summary | {"seq_len": flags["seq_len"], "num_tokens": total}


def describe_stability(curve: Stability, top_k: int) -> str:
    """One line: from how many tokens on the ranking can be trusted."""
    last = f"{curve.overlap[-1]:.0%} at {curve.sizes[-1]:,} tokens"
    if curve.stable_at is None:
        return (
            f"{curve.score:8} two samples share fewer than {curve.level:.0%} of their {top_k} best "
            f"experts ({last}): the ranking is not stable yet, score more tokens"
        )
    return (
        f"{curve.score:8} stable from {curve.stable_at:,} tokens on: two samples share at least "
        f"{curve.level:.0%} of their {top_k} best experts ({last})"
    )


def _count(loaded: Loaded, packed: Packed, flags: dict[str, Any], folder: Path) -> Counted:
    devices = jax.devices()
    mesh = make_mesh(data=len(devices)) if len(devices) > 1 else None
    batch_size = -(-flags["batch_size"] // len(devices)) * len(devices)
    num_batches = -(-len(packed.ids) // batch_size)
    options = ForwardOptions(flags["dtype"])
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(bar("scoring", num_batches))
        writer = None
        if flags["per_token"]:
            writer = functools.partial(_write_tokens, stack, {}, folder, loaded.config)

        def on_tokens(number, trace, segment_ids):
            advance(number + 1)
            if writer is not None:
                writer(trace, segment_ids)

        return expert_scores.count(
            loaded.params,
            loaded.config,
            fixed_batches(packed, batch_size),
            num_segments=max(map(len, packed.ids)),
            options=options,
            mesh=mesh,
            on_tokens=on_tokens,
        )


def _gradients(loaded: Loaded, packed: Packed, flags: dict[str, Any]) -> np.ndarray:
    """Gradient sizes over --gradient_batches batches of the task."""
    options = ForwardOptions(flags["dtype"], remat="full")
    batches = fixed_batches(packed, flags["batch_size"])
    number = min(flags["gradient_batches"], -(-len(packed.ids) // flags["batch_size"]))
    with bar("gradients", number) as advance:
        taken = (batch for _, batch in zip(range(number), batches, strict=False))
        return gradient_scores(
            lambda params, batch: lm_loss(params, loaded.config, batch, None, options)[1]["nll"],
            loaded.params,
            loaded.config,
            taken,
            advance,
        )


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Any]:
    """A progress bar of batches with the time left; nothing where there is no terminal."""
    columns = (
        TextColumn("{task.description} {task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def _write_tokens(stack, files: dict, folder: Path, config, trace, segment_ids) -> None:
    """Appends every conversation of a batch to its layers' per-token files."""
    for index, layer in enumerate(moe_layers(config)):
        if index not in files:
            path = folder / f"expert_weights_{layer}.txt"
            files[index] = stack.enter_context(path.open("w"))
        for row, segments_T in enumerate(segment_ids):
            for segment in range(1, int(segments_T.max()) + 1):
                mine = segments_T == segment
                experts = trace.experts_BTK[index, row][mine]
                gates = trace.scores_BTK[index, row][mine]
                files[index].write(score_files.token_line(experts, gates))


def _write_counts(path: Path, counted: Counted) -> None:
    """The exact counters: pooled, and per conversation."""
    names = ("chosen", "gates", "tokens")
    arrays: dict[str, Any] = {n: np.asarray(getattr(counted.pooled, n)) for n in names}
    arrays |= {f"sequence_{n}": np.asarray(getattr(counted.sequences, n)) for n in names}
    arrays |= {n: np.asarray(getattr(counted, n)) for n in ("layers", "experts", "top_k")}
    np.savez_compressed(path, **arrays)
