"""What mixing two folders costs, in memory and in time, on generated folders.

    python -m tests.io.measure_interpolate DIR [GIGABYTES]

Prints the peak of anonymous memory above what the imports took, and the time of mixtures and, in
turn with them, of plain passes that read both folders and write one with fsync and no arithmetic.
Inputs are hashed for the lineage as `launch.wise` does it. DIR is emptied of what was made in it.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.mixing import Plan, mixed_model
from moejax.io import lineage
from moejax.io.load import load_any, save_any
from moejax.methods.interpolate import Deltas
from tests.io.measure_convert import MEGABYTE, make_folder, watched


def interpolate(place: Path) -> None:
    """early and late to mixed, at delta 0.3."""
    names = [str(place / "early"), str(place / "late")]
    models = [load_any(name, abstract=True) for name in names]
    mixed = mixed_model(models, names, Plan("wise", Deltas(0.3)), whole=False)
    with ThreadPoolExecutor(2) as pool:
        inputs = [pool.submit(lineage.input_of, name) for name in names]

        def operations() -> lineage.Lineage:
            return lineage.append((), "interpolate", [done.result() for done in inputs])

        save_any(mixed, place / "mixed", operations=operations)


def plain_pass(place: Path) -> float:
    """Seconds to read both folders and write one of them, 8 MB at a time, with fsync."""
    begun = time.perf_counter()
    (place / "copy").mkdir()
    for path in sorted((place / "late").iterdir()):
        with (
            open(place / "early" / path.name, "rb", 0) as early,
            open(path, "rb", 0) as late,
            open(place / "copy" / path.name, "wb", 0) as write,
        ):
            while content := late.read(8 * MEGABYTE):
                early.read(8 * MEGABYTE)
                write.write(content)
            os.fsync(write.fileno())
    return time.perf_counter() - begun


def main() -> None:
    """Measures and prints."""
    place = Path(sys.argv[1])
    if sys.argv[2:3] == ["--one"]:
        cost = watched(lambda: interpolate(place))
        print(json.dumps((cost.seconds, cost.peak)))
        return
    gigabytes = float((sys.argv[2:] or ["2"])[0])
    command = [sys.executable, "-m", "tests.io.measure_interpolate", str(place), "--one"]
    ratios = []
    try:
        for name in ("early", "late"):
            make_folder(place / name, gigabytes * 1e9)
        for _ in range(3):
            plain = plain_pass(place)
            shutil.rmtree(place / "copy")
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            shutil.rmtree(place / "mixed")
            seconds, peak = json.loads(done.stdout)
            ratios.append(seconds / plain)
            print(
                f"mix {seconds:.2f} s, +{peak / MEGABYTE:.0f} MB; plain {plain:.2f} s", flush=True
            )
        print(f"median of the ratios {statistics.median(ratios):.2f}")
    finally:
        for name in ("early", "late", "mixed", "copy"):
            shutil.rmtree(place / name, ignore_errors=True)


if __name__ == "__main__":
    main()
