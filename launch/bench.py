"""Measures moejax's kernels and its MoE layer against goals and peers, on this machine.

  python -m launch.bench --suite=kernels              the grouped matrix products: CPU, TPU, GPU
  python -m launch.bench --suite=layer --peer         the expert-parallel layer, and what others do
  python -m launch.bench --suite=kernels --only=cpu   figures whose name matches
  python -m launch.bench --suite=layer --out=layer.json

CPU figures are timed. TPU and H100 figures come from programs compiled for them on this host, for
which `pip install -e .[aot]` is needed; no device is. A figure that cannot be measured here stands
in the table without a number and with the reason. Run it on an idle machine.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from launch import bench_cpu, cli
from launch.bench_row import Row, Wanted
from moejax.core.errors import InputError
from moejax.io.atomic import write_json

SUITE = flags.DEFINE_string("suite", None, "kernels or layer.")
PEER = flags.DEFINE_bool("peer", False, "Also measure the peers, with the same formula.")
ONLY = flags.DEFINE_string("only", None, "Measure only figures that match this regular expression.")
OUT = flags.DEFINE_string("out", None, "JSON file for the rows, the machine and the versions.")

Rows = Callable[[bool, Wanted], Iterator[Row]]
SUITES: dict[str, dict[str, Rows]] = {
    "kernels": {"cpu": bench_cpu.rows},
    "layer": {},
}
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "numpy", "torch", "transformers")


def main(argv: Sequence[str]) -> None:
    del argv
    if SUITE.value not in SUITES:
        raise InputError(f"--suite={SUITE.value or ''}: choose one of {', '.join(SUITES)}")
    wanted = matcher(ONLY.value)
    if OUT.value and not Path(OUT.value).absolute().parent.is_dir():
        raise InputError(f"--out={OUT.value}: its folder does not exist; make it first")
    if cli.DRY_RUN.value:
        print(f"would measure {', '.join(SUITES[SUITE.value])} of suite {SUITE.value}")
        return
    rows = list(measure(SUITES[SUITE.value], PEER.value, wanted))
    if not rows:
        raise InputError(f"--only={ONLY.value}: no figure of suite {SUITE.value} matches")
    Console(soft_wrap=not sys.stdout.isatty()).print(table(rows))
    if OUT.value:
        write_json(OUT.value, record(SUITE.value, rows))
        print(f"written: {OUT.value}")


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
            for row in rows(peer, wanted):
                if wanted(row.figure):
                    say(f"[{time.perf_counter() - started:.0f} s] {row.figure}: {number(row.ours)}")
                    yield row
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
        shown.add_row(
            row.figure, number(row.ours), row.unit, row.reach, reached, *peers, row.how
        )
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
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "suite": suite,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "versions": versions,
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


if __name__ == "__main__":
    cli.run(main)
