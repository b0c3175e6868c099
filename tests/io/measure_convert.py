"""What `launch.convert` from folder to folder costs, in memory and in time, on a generated folder.

    python -m tests.io.measure_convert DIR [GIGABYTES]

Prints the peak of anonymous memory above what the imports took (RssAnon of /proc, sampled every 2
ms), and the time of conversions and, in turn with them, of plain passes that read the same files
and write the same bytes with fsync. DIR is emptied of what was made in it.
"""

from __future__ import annotations

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

import numpy as np

from moejax.io.load import load_any, save_any
from moejax.io.safetensors import Entry, Info, dtype_named, write_folder
from moejax.models.families import by_name

MEGABYTE = 2**20


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


def watched(work: Callable[[], None]) -> tuple[float, float]:
    """(seconds, bytes of anonymous memory above the start) of some work."""
    start, peak, done = rss_anon(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    work()
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    return seconds, peak[0] - start


def convert(source: Path, target: Path, dtype: str = "keep") -> None:
    """One conversion from folder to folder."""
    save_any(load_any(source, abstract=True), target, "hf", dtype)


def rss_anon() -> int:
    """Bytes of this process's anonymous memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def plain_pass(source: Path, target: Path) -> float:
    """Seconds to read every file and write it again, 8 MB at a time, with fsync."""
    begun = time.perf_counter()
    target.mkdir()
    for path in sorted(source.iterdir()):
        with open(path, "rb", 0) as read, open(target / path.name, "wb", 0) as write:
            while content := read.read(8 * MEGABYTE):
                write.write(content)
            os.fsync(write.fileno())
    return time.perf_counter() - begun


def main() -> None:
    """Measures and prints."""
    place = Path(sys.argv[1])
    if sys.argv[2:3] == ["--one"]:
        dtype = sys.argv[3]
        print(json.dumps(watched(lambda: convert(place / "source", place / "target", dtype))))
        return
    largest = make_folder(place / "source", float((sys.argv[2:] or ["2"])[0]) * 1e9)
    size = sum(path.stat().st_size for path in (place / "source").iterdir())
    print(f"{size / 1e9:.2f} GB, largest tensor {largest / MEGABYTE:.0f} MB")
    times: list[tuple[float, float]] = []
    try:
        for _ in range(3):
            plain = plain_pass(place / "source", place / "copy")
            shutil.rmtree(place / "copy")
            seconds, peak = one(place, "keep")
            times.append((seconds, plain))
            print(f"convert {seconds:.2f} s, +{peak / MEGABYTE:.0f} MB; plain {plain:.2f} s")
        ratio = statistics.median(a / b for a, b in times)
        print(f"median of the ratios {ratio:.2f}")
        seconds, peak = one(place, "float32")
        print(f"to float32 {seconds:.2f} s, +{peak / MEGABYTE:.0f} MB")
    finally:
        for name in ("source", "target", "copy"):
            shutil.rmtree(place / name, ignore_errors=True)


def one(place: Path, dtype: str) -> tuple[float, float]:
    """A conversion in a process of its own."""
    command = [sys.executable, "-m", "tests.io.measure_convert", str(place), "--one", dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(place / "target")
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


if __name__ == "__main__":
    main()
