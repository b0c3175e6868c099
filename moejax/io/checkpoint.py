"""Checkpoints of a run: complete or not counted, checked before they are trusted, few kept.

    DIR/step_00000020/state/      the tree, written by orbax
    DIR/step_00000020/done.json   step, metrics, where the data stood, size and CRC of every file;
                                  written last

A checkpoint is written under another name, by threads of its own, and renamed when all of it is on
the disk. The next save waits for the one before, so a step that was asked for is never skipped. On
several processes, with one file system, every method is called by all of them in the same order;
each writes its parts and process 0 the rest.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic, orbax, processes

_DONE = "done.json"
_PART = ".part"
_STEP = re.compile(r"step_(\d+)")
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
      directory: made when the first one is saved.
      keep_last: how many of the newest are kept.
      keep_every: also keep every step that this divides, as for weight averaging; 0 keeps none.
      best_metric: also keep the one whose metrics have this name at its lowest; None keeps none.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep_last: int = 2,
        best_metric: str | None = None,
        keep_every: int = 0,
    ):
        if keep_last < 1:
            raise InputError(f"keep_last must be at least 1, got {keep_last}")
        if keep_every < 0:
            raise InputError(f"keep_every must be 0 or more, got {keep_every}")
        self.directory = Path(directory)
        self._keep_last = keep_last
        self._best_metric = best_metric
        self._keep_every = keep_every
        self._verdicts: dict[int, bool] = {}
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, step: int, params: tree.Tree, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Saves nested dicts of arrays as of `step`, then removes what need not be kept.

        A checkpoint of this step is replaced; later ones, of a run that was given up, are removed.
        InputError when the disk is full; what was there before is then still there.
        """
        with orbax.interrupts_held():
            self.start(step, params, metrics)
            self.wait()

    def start(
        self,
        step: int,
        params: tree.Tree,
        metrics: Mapping[str, float] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """`save` in the background; the arrays may be donated at once. Waits for a save before it.

        data: JSON of where the batches stand, which `data` gives back. Errors of the writing are
        raised by the next `start` or `wait`.
        """
        self.wait()
        part, problem = self.directory / _PART, ""
        if processes.is_first():
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(part, ignore_errors=True)
                atomic.require_disk(self.directory, tree.num_bytes(params))
                with atomic.space_errors(part):
                    part.mkdir()
            except InputError as error:
                problem = str(error)
        processes.agree(problem)
        with atomic.space_errors(part):
            written = orbax.start_saving(part / "state", params)
        said = {"step": step, "metrics": dict(metrics or {}), "data": dict(data or {})}
        self._writer = threading.Thread(
            target=self._finish, args=(said, written), name="checkpoint"
        )
        self._writer.start()

    def wait(self) -> None:
        """Waits until what was started is on the disk, on every process; raises its error."""
        if self._writer is None:
            return
        with orbax.interrupts_held():
            self._writer.join()
        self._writer, error, self._error = None, self._error, None
        problem = "" if error is None else str(error) or type(error).__name__
        if error is not None and not isinstance(error, InputError):
            if jax.process_count() == 1:
                raise error
            _log.error("checkpoint in %s failed", self.directory, exc_info=error)
        processes.agree(problem)

    def settle(self, limit_s: float = 60.0) -> None:
        """Lets a save that is under way come to its end when something else went wrong.

        On several processes no longer than `limit_s`: one that is gone would be waited for.
        """
        if self._writer is not None:
            self._writer.join(None if jax.process_count() == 1 else limit_s)

    def _finish(self, said: dict[str, Any], written: Callable[[], None]) -> None:
        """What the thread does: waits for orbax, then makes a checkpoint of its files."""
        step = said["step"]
        folder, part = self._folder(step), self.directory / _PART
        try:
            with atomic.space_errors(folder):
                written()
                if not processes.is_first():
                    return
                atomic.sync_files(part)
                atomic.write_json(part / _DONE, said | {"files": _checksums(part)})
                if folder.exists():
                    _remove(folder)
                os.replace(part, folder)
                atomic.sync_path(self.directory)
            self._verdicts[step] = True
            self._prune(step)
        except BaseException as error:  # raised by the thread that waits
            self._error = error
            if processes.is_first():
                shutil.rmtree(part, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps that were saved to the end, in order, intact or not."""
        if not self.directory.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(m[1]) for m in found if m and self._is_done(int(m[1])))

    def latest_step(self) -> int | None:
        """The newest step whose files are intact; a broken one is passed over with a warning.

        None when nothing was saved. InputError when all that was saved is broken: starting anew
        then has to be somebody's decision. On several processes, what process 0 finds.
        """
        step, problem = None, ""
        if processes.is_first():
            try:
                step = self._latest_step()
            except InputError as error:
                problem = str(error)
        processes.agree(problem)
        found = processes.from_first(-1 if step is None else step)
        return None if found < 0 else found

    def _latest_step(self) -> int | None:
        steps = self.steps()
        for step in reversed(steps):
            if self._is_intact(step):
                return step
            _log.warning(
                "checkpoint %s is broken: going back to the one before", self._folder(step)
            )
        if steps:
            raise InputError(
                f"all {len(steps)} checkpoints in {self.directory} are broken: "
                "remove that folder to start anew"
            )
        return None

    def best_step(self) -> int | None:
        """The step with the lowest `best_metric`; None when no checkpoint has it."""
        values = {step: self.metrics(step).get(str(self._best_metric)) for step in self.steps()}
        known = {s: value for s, value in values.items() if value is not None and value == value}
        return min(known, key=known.__getitem__) if known else None

    def metrics(self, step: int) -> dict[str, float]:
        """What `save` was told about a step."""
        return atomic.read_json(self._folder(step) / _DONE)["metrics"]

    def data(self, step: int) -> dict[str, Any]:
        """Where the batches stood at a step; nothing in checkpoints made before it was kept."""
        return atomic.read_json(self._folder(step) / _DONE).get("data", {})

    def restore(self, step: int | None, wanted: tree.Tree, partial: bool = False) -> tree.Tree:
        """Reads a checkpoint, onto whatever mesh and processes `wanted` names.

        Args:
          step: which; None takes the newest that is intact.
          wanted: nested dicts of `jax.ShapeDtypeStruct`, with shardings or without (then on the
            default device).
          partial: leave what `wanted` lacks on the disk, as the optimizer's state.

        Errors: InputError for a step that is not there or broken, or a tree of another config.
        """
        if step is None:
            step = self.latest_step()
            if step is None:
                raise InputError(f"{self.directory} holds no checkpoint")
        elif jax.process_count() > 1:
            pass  # a step that process 0 found
        elif step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise InputError(f"{self.directory} has no checkpoint of step {step}: it has {known}")
        elif not self._is_intact(step):
            raise InputError(f"checkpoint {self._folder(step)} is broken: choose another step")
        return orbax.load_tree(self._folder(step) / "state", wanted, partial)

    def _folder(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def _is_done(self, step: int) -> bool:
        return (self._folder(step) / _DONE).exists()

    def _is_intact(self, step: int) -> bool:
        if step not in self._verdicts:
            folder = self._folder(step)
            try:
                done = atomic.read_json(folder / _DONE)
                self._verdicts[step] = done["files"] == _checksums(folder)
            except (InputError, KeyError, TypeError):
                self._verdicts[step] = False
        return self._verdicts[step]

    def _prune(self, current: int) -> None:
        steps = self.steps()
        kept = {step for step in steps if step <= current}
        kept = set(sorted(kept)[-self._keep_last :])
        kept |= {step for step in steps if self._keep_every and step % self._keep_every == 0}
        kept = {step for step in kept if step <= current}
        best = None if self._best_metric is None else self.best_step()
        if best is not None:
            kept.add(best)
        for path in self.directory.iterdir():
            match = _STEP.fullmatch(path.name)
            if match and int(match[1]) not in kept:
                _remove(path)


def _remove(folder: Path) -> None:
    """Removes a checkpoint so that one cut off half way does not look complete."""
    (folder / _DONE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file below, but for the file that records them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _DONE:
            found[str(path.relative_to(folder))] = [path.stat().st_size, _crc(path)]
    return found


def _crc(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value
