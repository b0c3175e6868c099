"""What mixing two folders costs, in memory and in time, on generated folders.

    python -m tests.io.measure_interpolate DIR [GIGABYTES] [PAIRS]

Prints the peak of anonymous memory above what the imports took, and the time of mixtures and, in
turn with them, of plain passes that read both folders and write one with fsync and no arithmetic.
Inputs are hashed for the lineage as `launch.wise` does it. DIR is emptied of what was made in it.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.mixing import Plan, mixed_model
from moejax.io import lineage
from moejax.io.load import load_any, save_any
from moejax.methods.interpolate import Deltas
from tests.io.measure_convert import MEGABYTE, Cost, make_folder, paired, watched


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


def plain_pass(place: Path) -> None:
    """Reads both folders and writes one of them, 8 MB at a time, with fsync."""
    (place / "mixed").mkdir()
    for path in sorted((place / "late").iterdir()):
        with (
            open(place / "early" / path.name, "rb", 0) as early,
            open(path, "rb", 0) as late,
            open(place / "mixed" / path.name, "wb", 0) as write,
        ):
            while content := late.read(8 * MEGABYTE):
                early.read(8 * MEGABYTE)
                write.write(content)
            os.fsync(write.fileno())


def one(place: Path, what: str) -> Cost:
    """A mixture ("mix") or a plain pass ("plain") in a process of its own."""
    command = [sys.executable, "-m", "tests.io.measure_interpolate", str(place), "--one", what]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(place / "mixed")
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measures and prints."""
    place = Path(sys.argv[1])
    if sys.argv[2:3] == ["--one"]:
        work = {"mix": interpolate, "plain": plain_pass}[sys.argv[3]]
        print(json.dumps(watched(lambda: work(place))))
        return
    gigabytes, pairs = (*sys.argv[2:], *("2", "4")[len(sys.argv) - 2 :])
    try:
        for name in ("early", "late"):
            make_folder(place / name, float(gigabytes) * 1e9)
        paired(
            functools.partial(one, place, "mix"), functools.partial(one, place, "plain"), int(pairs)
        )
    finally:
        for name in ("early", "late", "mixed"):
            shutil.rmtree(place / name, ignore_errors=True)


if __name__ == "__main__":
    main()
