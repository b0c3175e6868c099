"""Rows of the CPU: the expert block, forward and backward, timed in pairs with its peers."""

from __future__ import annotations

from collections.abc import Iterator

from launch.bench_row import Row, Wanted


def rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """Nothing yet."""
    del peer, wanted
    yield from ()
