"""What a run has done so far: kept on disk as it goes on, and shown with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import Progress, TextColumn, TimeRemainingColumn

from launch.evaluate_settings import PARTIAL, Settings, console
from moejax.evals.samples import append_samples, read_partial, write_samples

_EVERY_S = 10.0  # between two lines where the console is no terminal

Record = dict[str, Any]
# Of all records so far: the score to show.
Score = Callable[[list[Record]], str]


@contextmanager
def keeping(
    settings: Settings, total: int, score: Score
) -> Iterator[tuple[list[Record], Callable[[list[Record]], None]]]:
    """Yields what an earlier run of this folder did, and what is to be called with records.

    New ones are appended to the folder's partial file, which `evaluate_settings.write_run` takes
    away when all is done. `total`: of records.
    """
    folder = settings.out
    whole = folder / "samples.jsonl"
    done = read_partial(whole) if whole.is_file() else read_partial(folder / PARTIAL)
    write_samples(folder / PARTIAL, done)
    known = {(record["id"], record["sample"]) for record in done}
    records: list[Record] = []
    with bar(settings.task, total) as shown:

        def keep(new: list[Record]) -> None:
            fresh = [record for record in new if (record["id"], record["sample"]) not in known]
            append_samples(folder / PARTIAL, fresh)
            records.extend(new)
            shown.skipped += len(new) - len(fresh)
            shown.update(len(records), score(records))

        yield done, keep


def passed(records: list[Record]) -> str:
    """How many passed."""
    return f"passed {sum(bool(record['passed']) for record in records)} of {len(records)}"


class Bar:
    """Progress with a running score and the time left: a bar on a terminal, else a line a while."""

    def __init__(self, name: str, total: int | None, progress: Progress | None) -> None:
        self.name, self.total, self.progress = name, total, progress
        self.began = self.said = time.monotonic()
        self.skipped = 0  # done by an earlier run, which says nothing about this one's rate
        self.id = progress.add_task(name, total=total, score="") if progress else None

    def update(self, done: int, score: str = "", total: int | None = None) -> None:
        """Says that `done` are done."""
        self.total = total or self.total
        if self.progress is not None and self.id is not None:
            self.progress.update(self.id, completed=done, total=self.total, score=score)
            return
        now = time.monotonic()
        if now - self.said < _EVERY_S or not self.total or done >= self.total:
            return
        self.said, rate = now, (done - self.skipped) / (now - self.began)
        left = f", about {(self.total - done) / rate:.0f} s left" if rate > 0 else ""
        console.print(
            f"{self.name}: {done} of {self.total}, {rate:.2g}/s{left}; {score}", markup=False
        )


@contextmanager
def bar(name: str, total: int | None) -> Iterator[Bar]:
    """A Bar."""
    if not console.is_terminal:
        yield Bar(name, total, None)
        return
    columns = (
        *Progress.get_default_columns()[:3],
        TimeRemainingColumn(),
        TextColumn("{task.fields[score]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(name, total, progress)
