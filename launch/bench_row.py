"""One line of the bench's table, and how a measurement in a process of its own hands it back.

A module of rows (`launch/bench_cpu.py` and its siblings) has

    def rows(peer: bool, wanted: Callable[[str], bool]) -> Iterator[Row]

which yields a row as soon as it is measured, measures only figures whose name is `wanted` and only
with `peer` what others do. A figure that cannot be measured here raises InputError with the reason.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from moejax.core.errors import InputError

Wanted = Callable[[str], bool]


@dataclasses.dataclass(frozen=True)
class Row:
    """figure: what is measured. ours and peer: numbers in `unit`, None where not measured.

    reach: the goal for ours with its sign (">= 1.5", "<= 700"), or empty. peer_name: who the peer
    is. how: in words, how both were measured, or why not.
    """

    figure: str
    ours: float | None
    unit: str
    reach: str = ""
    peer: float | None = None
    peer_name: str = ""
    how: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether ours meets the goal; None without one or without a number."""
        if not self.reach or self.ours is None:
            return None
        sign, bound = self.reach[:2].strip(), float(self.reach[2:].replace(",", ""))
        # A number may be numpy's, whose comparisons JSON does not take.
        return bool(self.ours >= bound if sign == ">=" else self.ours <= bound)


def measure_in_process(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None, timeout_s: int = 600
) -> dict[str, Any]:
    """Runs `python -m MODULE ARGUMENTS` and returns the JSON object on its last line of stdout.

    For measurements whose compiler reads its environment as it is loaded, or may end its process.
    Raises InputError with the process's last words when there is no such line.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    said = done.stderr.strip().splitlines() or ["nothing on stderr"]
    raise InputError(f"{module} {' '.join(arguments)} ended with {done.returncode}: {said[-1]}")


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call, which returns when it is done."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
