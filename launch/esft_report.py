"""launch.esft --stage=report: several tasks' scores -> heat maps, overlap, counts and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.esft_select import expert_bytes
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic
from moejax.io.load import load_any
from moejax.methods import expert_groups, expert_selection, score_files
from moejax.report import esft_page
from moejax.report.esft_page import Task


def main(flags: dict[str, Any]) -> None:
    """Writes OUT/report.html, report.json and the plots."""
    out = Path(flags["out"])
    if out.exists() and any(out.iterdir()) and not flags["overwrite"]:
        raise InputError(f"{out} exists: choose another name or pass --overwrite")
    threshold = 0.2 if flags["threshold"] is None else flags["threshold"]
    expert_selection.check_threshold(threshold)
    size = whole = None
    if flags["model"]:
        model = load_any(flags["model"], abstract=True)
        size, whole = expert_bytes(model), tree.num_bytes(model.params)
    tasks = [_task(item, flags, threshold, size) for item in flags["scores"].split(",")]
    for task in tasks[1:]:
        if (task.layers, task.experts) != (tasks[0].layers, tasks[0].experts):
            raise InputError(
                f"{task.name} has {task.values_LJ.shape} layers and experts and {tasks[0].name} "
                f"{tasks[0].values_LJ.shape}: these are scores of different models"
            )
    if flags["dry_run"]:
        print(f"dry run: {len(tasks)} tasks read, nothing written")
        return
    out.mkdir(parents=True, exist_ok=True)
    what = {"score": flags["score"], "threshold": threshold, "top_k": flags["top_k"]}
    groups = _groups(flags, tasks, threshold)
    record = esft_page.write(out, tasks, what, whole, groups)
    atomic.write_json(out / "report.json", record)
    for task in tasks:
        part = "" if task.num_bytes is None else f", {task.num_bytes / 1e6:,.1f} MB"
        print(f"{task.name:12} {task.num_chosen} of {task.values_LJ.size} experts{part}")
    print(f"written  {out / 'report.html'}")


def _groups(flags: dict[str, Any], tasks: list[Task], threshold: float) -> list[dict[str, Any]]:
    """The group-size simulation of the first task's per-token files, if sizes were given."""
    sizes = [int(size) for size in flags["group_sizes"] if size]
    if not sizes:
        return []
    path = flags["scores"].split(",")[0].rpartition("=")[2]
    choices = score_files.token_choices(path, flags["top_k"])
    first = tasks[0].experts[0]
    layers = [(ids - first, gates) for ids, gates in choices.values()]
    rows = expert_groups.group_sizes(layers, len(tasks[0].experts), sizes, threshold)
    for row in rows:
        grouped, drawn = row["co_occurrence"], row["random"]
        print(
            f"groups of {row['size']}: {grouped['share']:.1%} of the experts to train, grouped at "
            f"random {drawn['share']:.1%} ({tasks[0].name}, threshold {threshold:g})"
        )
    return rows


def _task(item: str, flags: dict[str, Any], threshold: float, size: int | None) -> Task:
    name, equals, path = item.partition("=")
    path = path if equals else item
    scores, _ = score_files.read_scores(path, flags["top_k"])
    decimals = flags["round_decimals"]
    scores = scores.rounded(None if decimals < 0 else decimals)
    order = sorted(range(len(scores.layers)), key=lambda i: scores.layers[i])
    chosen = expert_selection.select_by_threshold(scores, flags["score"], threshold)
    number = len(chosen.pairs)
    return Task(
        name if equals else Path(path).stem,
        scores.named(flags["score"])[order],
        tuple(scores.layers[i] for i in order),
        scores.experts,
        chosen.experts,
        None if size is None else number * size,
    )
