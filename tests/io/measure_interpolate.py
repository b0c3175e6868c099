"""What mixing two folders costs, in memory and in time, on generated folders.

    python -m tests.io.measure_interpolate DIR [GIGABYTES] [PAIRS] [MERGEKIT]

Prints the peak of anonymous memory above what the imports took, and the time of mixtures and, in
turn with them, of plain passes that read both folders and write one with fsync and no arithmetic.
Inputs are hashed for the lineage as `launch.wise` does it. DIR is emptied of what was made in it.

With MERGEKIT, the path of its command mergekit-yaml (pip install mergekit, in an environment of its
own, which needs torch), whole commands take turns instead: launch.wise, mergekit's linear merge,
and torch.lerp over the two state dicts by the torch beside it; imports are in those figures.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.mixing import Plan, input_hashes, mixed_model
from moejax.core.memory import keep_parts
from moejax.io import lineage
from moejax.io.load import load_any, save_any
from moejax.methods.interpolate import Deltas
from tests.io.measure_convert import MEGABYTE, Cost, make_folder, paired, rss_anon, watched

# What mergekit asks for that stored models have.
_YAML = """merge_method: linear
dtype: bfloat16
models:
- {{model: {early}, parameters: {{weight: 0.3}}}}
- {{model: {late}, parameters: {{weight: 0.7}}}}
"""
_LERP = """import os, sys, torch
from safetensors.torch import load_file, save_file
early, late, out = sys.argv[1:]
os.mkdir(out)
read = lambda folder: {k: v for f in sorted(os.listdir(folder)) if f.endswith(".safetensors")
                       for k, v in load_file(os.path.join(folder, f)).items()}
first, second = read(early), read(late)
mixed = {k: torch.lerp(second[k], first[k], 0.3) for k in second}
save_file(mixed, os.path.join(out, "model.safetensors"))
"""


def interpolate(place: Path) -> None:
    """early and late to mixed, at delta 0.3."""
    names = [str(place / "early"), str(place / "late")]
    models = [load_any(name, abstract=True) for name in names]
    mixed = mixed_model(models, names, Plan("wise", Deltas(0.3)), whole=False)
    with ThreadPoolExecutor(2) as pool:
        inputs = input_hashes(models, names, pool, whole=False)
        operations = lambda: lineage.append((), "interpolate", inputs())  # noqa: E731
        save_any(mixed, place / "mixed", operations=operations)


def plain_pass(place: Path) -> None:
    """Reads both folders and writes one of them, a megabyte at a time, with fsync."""
    buffers = [memoryview(bytearray(MEGABYTE)) for _ in range(2)]
    (place / "mixed").mkdir()
    for path in sorted((place / "late").iterdir()):
        with (
            open(place / "early" / path.name, "rb", 0) as early,
            open(path, "rb", 0) as late,
            open(place / "mixed" / path.name, "wb", 0) as write,
        ):
            while size := late.readinto(buffers[0]):
                early.readinto(buffers[1])
                write.write(buffers[0][:size])
            os.fsync(write.fileno())


def one(place: Path, what: str) -> Cost:
    """A mixture ("mix") or a plain pass ("plain") in a process of its own."""
    command = [sys.executable, "-m", "tests.io.measure_interpolate", str(place), "--one", what]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(place / "mixed")
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def commands(place: Path, mergekit: str, num_rounds: int) -> None:
    """Measures and prints whole commands in turn: ours, mergekit's, torch.lerp."""
    early, late, out = (str(place / name) for name in ("early", "late", "mixed"))
    (place / "merge.yaml").write_text(_YAML.format(early=early, late=late))
    torch_python = str(Path(mergekit).parent / "python")
    launched = {
        "launch.wise": [
            *(sys.executable, "-m", "launch.wise", f"--early={early}", f"--late={late}"),
            *("--delta=0.3", f"--out={out}"),
        ],
        "mergekit": [mergekit, str(place / "merge.yaml"), out],
        "torch.lerp": [torch_python, "-c", _LERP, early, late, out],
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in launched}
    for number in range(num_rounds):
        names = list(launched)
        for name in names[number % 3 :] + names[: number % 3]:
            begun, peak = time.perf_counter(), 0
            with subprocess.Popen(launched[name], stdout=subprocess.DEVNULL) as process:
                while process.poll() is None:
                    peak = max(peak, rss_anon(process.pid))
                    time.sleep(0.005)
            found[name].append((time.perf_counter() - begun, peak))
            assert process.returncode == 0, name
            shutil.rmtree(out)
    (place / "merge.yaml").unlink()
    for name, costs in found.items():
        seconds, peaks = zip(*costs, strict=True)
        print(
            f"{name:12} {statistics.median(seconds):.1f} s ({min(seconds):.1f} to "
            f"{max(seconds):.1f}), {max(peaks) / MEGABYTE:,.0f} MB of anonymous memory"
        )


def main() -> None:
    """Measures and prints."""
    place = Path(sys.argv[1])
    if sys.argv[2:3] == ["--one"]:
        work = {"mix": interpolate, "plain": plain_pass}[sys.argv[3]]
        keep_parts()
        print(json.dumps(watched(lambda: work(place))))
        return
    given = sys.argv[2:]
    gigabytes, pairs, mergekit = (*given, *("2", "4", "")[len(given) :])
    try:
        for name in ("early", "late"):
            make_folder(place / name, float(gigabytes) * 1e9)
        if mergekit:
            commands(place, mergekit, int(pairs))
            return
        paired(
            functools.partial(one, place, "mix"), functools.partial(one, place, "plain"), int(pairs)
        )
    finally:
        for name in ("early", "late", "mixed"):
            shutil.rmtree(place / name, ignore_errors=True)


if __name__ == "__main__":
    main()
