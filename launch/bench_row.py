"""One line of the bench's table, and how a measurement in a process of its own hands it back.

A module of rows (`launch/bench_cpu.py` and its siblings) has

    def rows(peer: bool, wanted: Callable[[str], bool]) -> Iterator[Row]

which yields a row as soon as it is measured, measures only figures whose name is `wanted` and only
with `peer` what others do. A figure that cannot be measured here raises InputError with the reason.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from moejax.core.errors import InputError
from moejax.core.memory import keep_freed

Wanted = Callable[[str], bool]
Program = Callable[[], Any]


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


class Elsewhere:
    """A peer's program in a process of its own, which runs it when asked and waits in between.

    There the allocator is as the peer's users find it, or, with `kept`, keeps what is freed as our
    commands do (`moejax.core.memory.keep_freed`): in one process a peer gains by what ours set.
    """

    def __init__(self, make: Callable[..., Program], *arguments: Any, kept: bool = False):
        """make(*arguments), called over there, returns the program; both are pickled.

        InputError if it fails, with its last words.
        """
        spawn = multiprocessing.get_context("spawn")
        self._here, there = spawn.Pipe()
        self._process = spawn.Process(
            target=_serve, args=(there, make, arguments, kept), daemon=True
        )
        self._process.start()
        there.close()
        self._answer()

    def seconds(self) -> float:
        """Of one run."""
        self._here.send(None)
        return self._answer()

    def __enter__(self) -> Elsewhere:
        """Itself; its process ends with the block."""
        return self

    def __exit__(self, *_: object) -> None:
        self._here.close()
        self._process.join()

    def _answer(self) -> float:
        try:
            found = self._here.recv()
        except EOFError:
            self._process.join()
            found = f"its process ended with {self._process.exitcode}"
        if isinstance(found, str):
            raise InputError(f"the peer did not run: {found}")
        return found


def _serve(pipe: Any, make: Callable[..., Program], arguments: tuple[Any, ...], kept: bool) -> None:
    try:
        if kept:
            keep_freed()
        program = make(*arguments)
        program()  # compiled and warm
        pipe.send(0.0)
        while True:
            pipe.recv()
            pipe.send(timed(program))
    except EOFError:
        return
    except Exception as error:  # whatever a peer raises, the bench goes on without it
        pipe.send(f"{type(error).__name__}: {error}")


def paired(ours: Program, peer: Callable[[], float], num_pairs: int) -> float:
    """How many times as long a peer takes: the median over pairs of runs that follow each other."""
    return statistics.median(1 / (timed(ours) / peer()) for _ in range(num_pairs))
