"""What a stage that plans by tracing says when memory ran out: its table, and what makes it fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from launch.settings import describe_memory
from moejax.core.memory import GIB, available_bytes
from moejax.train.memory import StepMemory


def explainer(
    config: ConfigDict, memory_of: Callable[[ConfigDict], StepMemory]
) -> Callable[[int | None], list[str]]:
    """For `launch.out_of_memory`. memory_of: the step's memory under a changed config, traced."""

    def explain(asked: int | None) -> list[str]:
        now = memory_of(config)
        held = sum(array.nbytes for array in jax.live_arrays())
        stats = jax.local_devices()[0].memory_stats() or {}
        limit = int(stats.get("bytes_limit", held + available_bytes()))
        # What was asked for beside what is held did not fit, whatever was reckoned.
        missed = max(0, held + (asked or 0) - now.total, limit - now.total)
        lines = [describe_memory(now), "change, one after the other, until it fits (traced):"]
        for changed, text, cost in _changes(config):
            then = memory_of(changed)
            if then.total >= now.total:
                continue
            now, needed = then, then.total + missed
            lines.append(f"  {text}: about {needed / GIB:.2f} GiB; {cost}")
            if needed <= 0.95 * limit:
                return lines
        return [*lines, f"  a device with more than {(now.total + missed) / GIB:.2f} GiB"]

    return explain


def _changes(config: ConfigDict) -> Iterator[tuple[ConfigDict, str, str]]:
    """Ever more of them: (the config so far, the flag, what it costs), the cheapest first."""
    config = copy.deepcopy(config)
    rows = config.train.batch_size
    for parts in (n for n in range(config.train.accumulation + 1, rows + 1) if rows % n == 0):
        config.train.accumulation = parts
        yield config, f"--config.train.accumulation={parts}", "slower, the same sums"
    if config.compute.remat != "full":
        config.compute.remat = "full"
        yield config, "--config.compute.remat=full", "about a third more arithmetic"
    if config.model.dtype != "bfloat16":
        config.model.dtype = config.compute.dtype = "bfloat16"
        text = "--config.model.dtype=bfloat16 --config.compute.dtype=bfloat16"
        yield config, text, "weights at 8 bits of precision: another run"
    while config.data.seq_len > 256:
        config.data.seq_len //= 2
        text = f"--config.data.seq_len={config.data.seq_len}"
        yield config, text, "longer texts are cut: another run"
