"""What a run tells: a console line, metrics.jsonl (the record), TensorBoard, env.json."""

from __future__ import annotations

import collections
import datetime
import json
import math
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from moejax.core.platform import versions
from moejax.io import processes
from moejax.io.atomic import write_text

METRICS_FILE = "metrics.jsonl"
Record = dict[str, Any]


def read_metrics(workdir: str | os.PathLike[str]) -> list[Record]:
    """The records of a run so far; a line cut short by a kill is left out."""
    path = Path(workdir) / METRICS_FILE
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def truncate_metrics(workdir: str | os.PathLike[str], step: int) -> None:
    """Drops records of steps after `step`: a resumed run does those again."""
    kept = [json.dumps(r) + "\n" for r in read_metrics(workdir) if r["step"] <= step]
    write_text(Path(workdir) / METRICS_FILE, "".join(kept))


def environment() -> dict[str, Any]:
    """What a run runs on: versions, platform, devices, and the time, as JSON."""
    names = ("moejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "versions": versions(*names),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "backend": device.platform,
        "device": device.device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def load_imbalance(expert_count_LJ: np.ndarray) -> float:
    """Largest over layers of (tokens of the fullest routed expert / mean over routed experts)."""
    mean_L = np.maximum(expert_count_LJ.mean(axis=-1), 1e-9)
    return float((expert_count_LJ.max(axis=-1) / mean_L).max())


def format_line(record: Record, total_steps: int, eta_s: float | None = None) -> str:
    """One console line of a training record; only what the record holds is shown."""
    parts = [f"step {record['step']}/{total_steps}"]
    shown = (
        ("loss", "loss {:.4f}"),
        ("lr", "lr {:.2e}"),
        ("grad_norm", "grad {:.3g}"),
        ("tokens_per_s", "{:,.0f} tok/s"),
        ("gflops", "{:,.0f} GFLOP/s"),
        ("mfu", "MFU {:.0%}"),
        ("load_max", "load {:.2f}"),
    )
    parts += [form.format(record[key]) for key, form in shown if key in record]
    if eta_s is not None:
        parts.append(f"ETA {format_duration(eta_s)}")
    return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(max(0, math.ceil(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RunLog:
    """Writes records as they come. Use as a context manager; `quiet` silences the console only.

    Of several processes only the first writes and speaks.
    """

    def __init__(self, workdir: Path, title: str, total_steps: int, start: int, quiet: bool):
        self._writes = processes.is_first()
        quiet = quiet or not self._writes
        self._total_steps, self._title, self._quiet = total_steps, title, quiet
        self._last_step = start
        if self._writes:
            # 2 s of imports that only a run needs.
            from tensorboardX import SummaryWriter

            self._jsonl = (workdir / METRICS_FILE).open("a", encoding="utf-8")
            self._board = SummaryWriter(str(workdir / "tb"), purge_step=start + 1)
        self._step_s: collections.deque[float] = collections.deque(maxlen=20)
        self._console = Console(file=sys.stdout, highlight=False, quiet=quiet)
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.fields[title]}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(
                "train", total=total_steps, completed=start, title=title, line="compiling"
            )

    def __enter__(self) -> RunLog:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exc) -> None:
        if self._bar:
            self._bar.stop()
        if self._writes:
            self._jsonl.close()
            self._board.close()

    def train(self, record: Record, show: bool) -> None:
        """Records one update. `record` holds step, step_s, loss and whatever else is known."""
        self._write(record)
        steps_left = self._total_steps - record["step"]
        line = format_line(record, self._total_steps, self._eta(record["step_s"], steps_left))
        if self._bar:
            text = line.partition("  ")[2]
            self._bar.update(self._task, completed=record["step"], line=text)
        elif show:
            self.say(line)

    def evaluation(self, record: Record) -> None:
        """Records one evaluation: keys other than step are ``eval/<name>``."""
        self._write(record)
        values = "  ".join(f"{k} {v:.4f}" for k, v in record.items() if k != "step")
        self.say(f"step {record['step']}/{self._total_steps}  {values}")

    def say(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        line = f"[{self._title}] {text}" if self._title and not self._bar else text
        # soft_wrap: a pipe must get one line per record whatever width rich assumes.
        self._console.print(line, markup=False, soft_wrap=True)

    def _write(self, record: Record) -> None:
        if not self._writes:
            return
        self._jsonl.write(json.dumps(record) + "\n")
        self._jsonl.flush()
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(key, value, record["step"])

    def _eta(self, step_s: float, steps_left: int) -> float:
        # The first step of a process compiles; it predicts nothing once there is another.
        self._step_s.append(step_s)
        known = list(self._step_s)[1:] or [step_s]
        return statistics.median(known) * steps_left
