"""What the bench shows and keeps: rows chosen, measured in turn, as a table and as a record."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from launch.bench_row import Row, Wanted
from moejax.core import platform as device
from moejax.core.errors import InputError
from moejax.core.memory import give_back

Rows = Callable[[bool, Wanted], Iterator[Row]]
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "numpy", "torch", "transformers")


def matcher(pattern: str | None) -> Wanted:
    """Whether a figure's name matches --only; every name does without it."""
    try:
        compiled = re.compile(pattern or "", re.IGNORECASE)
    except re.error as error:
        raise InputError(f"--only={pattern}: not a regular expression ({error})") from None
    return lambda figure: compiled.search(figure) is not None


def measure(parts: dict[str, Rows], peer: bool, wanted: Wanted) -> Iterator[Row]:
    """Each part's rows, told on stderr as they come; what cannot be measured says why."""
    started = time.perf_counter()
    for name, rows in parts.items():
        say(f"{name} ...")
        try:
            if name == "cpu" and device.platform() != "cpu":
                raise InputError("its figures are a CPU's: JAX_PLATFORMS=cpu times them here")
            for row in rows(peer, wanted):
                if wanted(row.figure):
                    say(f"[{time.perf_counter() - started:.0f} s] {row.figure}: {number(row.ours)}")
                    yield row
                give_back()  # the next row has other shapes
        except InputError as reason:
            if wanted(name):
                yield Row(figure=name, ours=None, unit="", how=f"not measured: {reason}")


def table(rows: list[Row]) -> Table:
    """What the console shows."""
    shown = Table(box=None, pad_edge=False)
    for name in ("figure", "ours", "unit", "goal", "reached", "peer", "peer is", "how"):
        right = name in ("ours", "peer")
        shown.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        reached = {True: "yes", False: "no", None: ""}[row.reached]
        peers = (number(row.peer) if row.peer_name else "", row.peer_name)
        texts = (row.figure, number(row.ours), row.unit, row.reach, reached, *peers, row.how)
        shown.add_row(*map(escape, texts))  # or [aot] would be a style
    return shown


def number(value: float | None) -> str:
    """Four significant digits, thousands separated; a dash for what was not measured."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def record(suite: str, rows: list[Row]) -> dict[str, Any]:
    """What --out holds: enough to know what was measured, where and with what."""
    return {
        "suite": suite,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "versions": {"python": platform.python_version()} | device.versions(*PACKAGES),
        "rows": [{**dataclasses.asdict(row), "reached": row.reached} for row in rows],
    }


def processor() -> str:
    """The processor's name as Linux has it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
