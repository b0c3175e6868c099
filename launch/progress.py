"""Progress bars of commands that read and write models."""

from __future__ import annotations

import contextlib

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextlib.contextmanager
def bars():
    """Two progress bars on a terminal, nothing elsewhere."""
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks = [progress.add_task(name, total=None) for name in ("reading", "writing")]

        def bar(task):
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield tuple(map(bar, tasks))
