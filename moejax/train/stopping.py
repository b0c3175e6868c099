"""How a run is stopped from outside, and how a step that hangs is seen."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Preempted(KeyboardInterrupt):
    """Raised after SIGTERM, once the state is saved; ctrl-C gives a plain KeyboardInterrupt.

    exit_code: what a launcher ends with, EX_TEMPFAIL of sysexits.h: start the same command again.
    """

    exit_code = 75


class StopRequest:
    """Set by the first ctrl-C or SIGTERM; `error` is what to raise when the state is saved."""

    def __init__(self):
        self.error: type[KeyboardInterrupt] | None = None


@contextlib.contextmanager
def stop_on_signal(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turns the first ctrl-C (or SIGTERM) into a request to stop; a second one acts as always."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def handle(number, frame):
        stop.error = Preempted if number == signal.SIGTERM else KeyboardInterrupt
        for each in signals:
            signal.signal(each, before[each])
        say("stopping after this step (once more stops at once, unsaved)")

    for number in signals:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number in signals:
            signal.signal(number, before[number])


# What may stop a run; of several that the processes were asked for, the last is told to all.
_ERRORS = (None, KeyboardInterrupt, Preempted)


class Agreement:
    """What any process of a mesh was asked to stop with, known to all at the same step.

    A tiny program behind every step takes the largest of the devices' numbers; its answer is read
    one step later, so nobody waits for it. On one process its own.
    """

    def __init__(self, mesh: Mesh | None):
        self._mesh = mesh if mesh is not None and jax.process_count() > 1 else None
        self._asked: jax.Array | None = None

    def reached(self, error: type[KeyboardInterrupt] | None) -> type[KeyboardInterrupt] | None:
        """Called once a step by every process, with what it was asked; what all stop with."""
        if self._mesh is None:
            return error
        before, axes = self._asked, self._mesh.axis_names
        sharding = NamedSharding(self._mesh, PartitionSpec(axes))
        number = _ERRORS.index(error)
        numbers = jax.make_array_from_callback(
            (self._mesh.size,), sharding, lambda index: np.full(1, number, np.int32)
        )
        self._asked = _largest(self._mesh)(numbers)
        return None if before is None else _ERRORS[int(before)]


@functools.lru_cache(maxsize=4)
def _largest(mesh: Mesh):
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))


class Watchdog:
    """Dumps the stack of every thread when nothing has been heard for `limit_s` seconds.

    Use as a context manager and call `beat` after every step. The dump goes to `path` by a timer
    that needs no Python to run (`faulthandler`), so also when a thread holds the interpreter; a
    line on stderr says which step hangs and where the stacks are. 0 seconds watches nothing.
    """

    def __init__(self, limit_s: float, path: Path):
        self._limit_s, self._path = limit_s, path
        self._step, self._heard = 0, time.monotonic()
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._limit_s:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            self.beat(0)
        return self

    def __exit__(self, *exc) -> None:
        self._over.set()
        if self._limit_s:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if not self._path.stat().st_size:
                self._path.unlink()

    def beat(self, step: int) -> None:
        """A step has ended: start counting anew."""
        if self._limit_s:
            self._step, self._heard = step, time.monotonic()
            faulthandler.dump_traceback_later(self._limit_s, repeat=True, file=self._file)

    def _watch(self) -> None:
        said = None
        while not self._over.wait(min(1.0, self._limit_s / 4)):
            if time.monotonic() - self._heard > self._limit_s and said != self._heard:
                said = self._heard
                print(
                    f"process {jax.process_index()}: nothing after step {self._step} for "
                    f"{self._limit_s:g} s; the stacks of all threads are in {self._path}",
                    file=sys.stderr,
                    flush=True,
                )
