"""What `launch.convert` from folder to folder costs, in memory and in time, on a generated folder.

From Hugging Face's format to itself, to float32, to our own format and back.

    python -m tests.io.measure_convert DIR [GIGABYTES] [PAIRS]

Prints the peak of anonymous memory above what the imports took (RssAnon of /proc, sampled every 2
ms), and the time of conversions and, in turn with them, of plain passes that read the same files
and write the same bytes with fsync. DIR is emptied of what was made in it.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moejax.io.load import load_any, save_any
from moejax.io.safetensors import Entry, Info, dtype_named, write_folder
from moejax.io.stream import check_all
from moejax.models.families import by_name

MEGABYTE = 2**20
PLAIN = "plain"


def make_folder(folder: Path, num_bytes: float) -> int:
    """A Llama of about so many bytes of bfloat16, in shards; returns its largest tensor's bytes."""
    family = by_name("llama")
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 65536,
        "num_hidden_layers": max(1, round((num_bytes - 5.4e8) / 9.2e7)),
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
    }
    dtype = dtype_named("bfloat16")
    block = np.random.default_rng(0).standard_normal(MEGABYTE, dtype=np.float32).astype(dtype)
    entries = [
        Entry(w.hf_name, Info(w.hf_shape, dtype), lambda w=w: _fill(w.hf_shape, block))
        for w in family.name_table(family.config_from_hf(fields))
    ]
    folder.mkdir(parents=True)
    write_folder(folder, entries, 5 * 10**8)
    (folder / "config.json").write_text(json.dumps(fields))
    return max(entry.num_bytes for entry in entries)


def _fill(shape: tuple[int, ...], block: np.ndarray):
    left = int(np.prod(shape))
    while left:
        yield block[: min(left, block.size)]
        left -= min(left, block.size)


class Cost(NamedTuple):
    """Seconds, those of the processors, bytes of anonymous memory above the start."""

    seconds: float
    cpu_s: float
    peak: float


def watched(work: Callable[[], None]) -> Cost:
    """What some work costs."""
    start, peak, done = rss_anon(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
    done.set()
    watcher.join()
    return Cost(seconds, cpu_s, peak[0] - start)


def convert(source: Path, target: Path, format: str = "hf", dtype: str = "keep") -> None:
    """What `launch.convert` does: looks for what is wrong, then writes."""
    loaded = load_any(source, abstract=True)
    assert loaded.tensors is not None
    check_all(loaded.tensors, by_name(loaded.config.family).name_table(loaded.config), dtype)
    save_any(loaded, target, format, dtype)


def rss_anon(process: int | str = "self") -> int:
    """Bytes of a process's anonymous memory; 0 when it has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def plain_pass(source: Path, target: Path) -> None:
    """Reads every file and writes it again, 8 MB at a time, with fsync."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        with open(path, "rb", 0) as read, open(target / path.name, "wb", 0) as write:
            while content := read.read(8 * MEGABYTE):
                write.write(content)
            os.fsync(write.fileno())


def main() -> None:
    """Measures and prints."""
    place = Path(sys.argv[1])
    if sys.argv[2:3] == ["--one"]:
        source, format, dtype = sys.argv[3:]
        target = place / "target"
        work = functools.partial(convert, place / source, target, format, dtype)
        if format == PLAIN:
            work = functools.partial(plain_pass, place / source, target)
        print(json.dumps(watched(work)))
        return
    largest = make_folder(place / "source", float((sys.argv[2:] or ["2"])[0]) * 1e9)
    size = sum(path.stat().st_size for path in (place / "source").iterdir())
    print(f"{size / 1e9:.2f} GB, largest tensor {largest / MEGABYTE:.0f} MB")
    try:
        for source, format in (("source", "hf"), ("source", "orbax"), ("ours", "hf")):
            if source == "ours":
                convert(place / "source", place / "ours", "orbax")
            print(f"{'orbax' if source == 'ours' else 'hf'} to {format}")
            work = functools.partial(one, place, source, format)
            plain = functools.partial(one, place, "source", PLAIN)
            paired(work, plain, int((sys.argv[3:] or ["4"])[0]))
        print(f"to float32: {shown(one(place, 'source', 'hf', 'float32'))}")
    finally:
        for name in ("source", "ours", "target"):
            shutil.rmtree(place / name, ignore_errors=True)


def paired(work: Callable[[], Cost], plain: Callable[[], Cost], num_pairs: int) -> None:
    """Measures and prints some work and a plain pass in turn, each first in half of the pairs.

    Pages just given back by whoever came before cost a third as much as others: an uncounted plain
    pass before each lets both find the same ones.
    """
    pairs: list[tuple[Cost, Cost]] = []
    for number in range(num_pairs):
        found: list[Cost] = []
        for what in (plain, work) if number % 2 else (work, plain):
            plain()
            found.append(what())
        pairs.append((found[1], found[0]) if number % 2 else (found[0], found[1]))
        print(f"  work {shown(pairs[-1][0])}; plain {shown(pairs[-1][1])}", flush=True)
    ratios = sorted(a.seconds / b.seconds for a, b in pairs)
    middle = statistics.median(ratios)
    print(f"  median of the ratios {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def shown(cost: Cost) -> str:
    """A cost in words."""
    return f"{cost.seconds:.1f} s (cpu {cost.cpu_s:.1f}), +{cost.peak / MEGABYTE:.0f} MB"


def one(place: Path, source: str, format: str, dtype: str = "keep") -> Cost:
    """A conversion, or a plain pass, in a process of its own."""
    module = ["-m", "tests.io.measure_convert"]
    command = [sys.executable, *module, str(place), "--one", source, format, dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(place / "target")
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
