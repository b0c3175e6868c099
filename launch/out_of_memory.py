"""What a command says when memory ran out: what holds it, and what to change, in order."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable

from absl import flags

from moejax.core.memory import GIB, available_bytes

EXIT_OUT_OF_MEMORY = 3
KEEP_FREED = "MOEJAX_KEEP_FREED"  # in the environment: 0 leaves out `keep_freed`
_SAID = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|failed to allocate|Unable to allocate")
# Flag -> what a smaller value of it gives up; the ones that a command has are named, in this order.
_FLAGS = {
    "batch_size": "fewer rows at a time: slower, the same results",
    "max_new_tokens": "shorter answers, and a smaller cache",
    "num_samples": "fewer answers per task",
    "seq_len": "shorter rows: longer texts are cut",
    "experts": "fewer experts, each of which is a copy of the feed-forward layers",
}
_DTYPE = "--dtype=bfloat16: half the bytes of float32 weights, at 8 bits of precision"
_explainers: list[Callable[[int | None], list[str]]] = []
_last_remedies: list[str] = []


def explain_with(explain: Callable[[int | None], list[str]]) -> None:
    """Registers what a command knows of its memory: from bytes that were asked for to lines."""
    _explainers.append(explain)


def remember_kept() -> None:
    """Says at the end of every answer that this process keeps what it frees."""
    _last_remedies.append(
        f"freed memory is kept, up to twice what is needed: with {KEEP_FREED}=0 in the environment "
        "it goes back, and the run is slower"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is MemoryError, or JAX's for memory that a device or the host could not give."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, ValueError):  # what jax raises for an array made outside jit
        return str(error).startswith("RESOURCE_EXHAUSTED")
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and bool(
        _SAID.search(str(error))
    )


def answer(error: BaseException) -> int:
    """Prints the error in one line, the memory table and the remedies; returns the exit code."""
    words = " ".join(str(error).split())[:300] or type(error).__name__
    lines = [f"error: out of memory: {words}", *_held()]
    explained: list[str] = []
    for explain in _explainers:
        try:
            explained += explain(_asked_bytes(str(error)))
        except (ValueError, MemoryError, RuntimeError) as other:
            explained.append(f"(no estimate of this run: {other})")
    lines += (explained or _of_flags()) + _last_remedies
    print("\n".join(lines), file=sys.stderr, flush=True)
    return EXIT_OUT_OF_MEMORY


def _asked_bytes(message: str) -> int | None:
    """Of "allocating 123 bytes" or "allocate 1.5GiB"; None where the message does not say."""
    found = re.search(r"allocat\w+ (\d+) bytes", message)
    if found:
        return int(found[1])
    found = re.search(r"allocate ([\d.]+)([KMGT])i?B", message)
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)) if found else None


def _held() -> list[str]:
    """What is held now: by each device, by the largest kinds of arrays, and what is free."""
    import jax

    lines = []
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            used, limit = stats["bytes_in_use"] / GIB, stats["bytes_limit"] / GIB
            lines.append(f"  {device}: {used:.2f} of {limit:.2f} GiB in use")
    if not lines:
        lines.append(f"  {available_bytes() / GIB:.2f} GiB are free on this machine")
    sums: Counter[str] = Counter()
    for array in jax.live_arrays():
        shape = ",".join(map(str, array.shape))
        sums[f"{array.dtype.name}[{shape}]"] += sum(s.data.nbytes for s in array.addressable_shards)
    for kind, size in sums.most_common(5):
        lines.append(f"  {size / GIB:.2f} GiB in arrays {kind}")
    return ["memory held", *lines]


def _of_flags() -> list[str]:
    """Remedies in terms of the flags that this command has."""
    given = flags.FLAGS
    lines = [f"a smaller --{name}: {cost}" for name, cost in _FLAGS.items() if name in given]
    if "config" in given:
        lines += [
            "--config.train.accumulation=N: N parts of the batch one after the other",
            "--config.compute.remat=full: about a third more arithmetic",
            "--config.train.optimizer=adafactor: no momentum; another run",
        ]
    if "dtype" in given and given["dtype"].value in (None, "float32", "keep"):
        lines.append(_DTYPE)
    lines.append("a machine, or a device, with more memory")
    return ["try, in this order"] + [f"  {n}. {line}" for n, line in enumerate(lines, 1)]
