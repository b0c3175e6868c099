"""Measures moejax's kernels against goals and peers, on this machine.

  python -m launch.bench --suite=kernels --peer            the experts' matrix products: timed on
                                                           the CPU and on an NVIDIA GPU, counted for
                                                           a TPU v5p
  python -m launch.bench --suite=kernels --only=v5p        the last alone (--only=gpu: the second)
  python -m launch.bench --suite=kernels --only=E64        figures whose name matches
  python -m launch.bench --suite=kernels --out=rows.json
  python -m launch.bench --suite=layer --peer              the layer on a v5p:2x2x2, compiled
  python -m launch.bench --suite=train --peer              a training step on the CPU or GPU
  python -m launch.bench --suite=data --peer               padding and tokens per second of the data
                                                           pipeline alone
  python -m launch.bench --suite=serve --peer              tokens per second beside transformers
  python -m launch.bench --suite=shadow --peer             decoding that skips heads and neurons:
                                                           timed on the CPU and on an NVIDIA GPU,
                                                           counted for a TPU v5e
  python -m launch.bench --suite=graft                     LLM Modules: an epoch from states on disk
                                                           and a token with the bridge on the CPU;
                                                           memory and time for a v5e, v5p and H100
  python -m launch.bench --suite=sandbox                   programs graded per second

A figure that cannot be measured here (a peer that is not installed, or needs more memory) stands in
the table without a number and with the reason. Run kernels and train on an idle machine. What is
for TPUs is compiled for some that are not here, which needs the extra [aot]: `tests/run --aot`
makes an environment that has it, .venv-aot.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich.console import Console

from launch import (
    bench_cpu,
    bench_data,
    bench_gpu,
    bench_graft,
    bench_graft_plan,
    bench_layer,
    bench_sandbox,
    bench_serve,
    bench_shadow,
    bench_tpu,
    bench_train,
    cli,
)
from launch.bench_table import Rows, matcher, measure, record, table
from moejax.core.errors import InputError
from moejax.io.atomic import write_json

SUITE = flags.DEFINE_string(
    "suite", None, "kernels, layer, train, data, serve, shadow, graft or sandbox."
)
PEER = flags.DEFINE_bool("peer", False, "Also measure the peers, with the same formula.")
ONLY = flags.DEFINE_string("only", None, "Measure only figures that match this regular expression.")
OUT = flags.DEFINE_string("out", None, "JSON file for the rows, the machine and the versions.")

SUITES: dict[str, dict[str, Rows]] = {
    "kernels": {"cpu": bench_cpu.rows, "gpu": bench_gpu.rows, "tpu": bench_tpu.rows},
    "layer": {"mesh": bench_layer.rows},
    "train": {"step": bench_train.rows},
    "data": {"cpu": bench_data.rows},
    "serve": {"cpu": bench_serve.rows},
    "shadow": {
        "cpu": bench_shadow.rows,
        "gpu": bench_shadow.gpu_rows,
        "tpu": bench_shadow.tpu_rows,
    },
    "graft": {"cpu": bench_graft.rows, "chips": bench_graft_plan.rows},
    "sandbox": {"cpu": bench_sandbox.rows},
}


def main(argv: Sequence[str]) -> None:
    del argv
    if SUITE.value not in SUITES:
        raise InputError(f"--suite={SUITE.value or ''}: choose one of {', '.join(SUITES)}")
    wanted = matcher(ONLY.value)
    if OUT.value and not Path(OUT.value).absolute().parent.is_dir():
        raise InputError(f"--out={OUT.value}: its folder does not exist; make it first")
    if cli.DRY_RUN.value:
        print(f"would measure {', '.join(SUITES[SUITE.value])} of suite {SUITE.value}")
        return
    if PEER.value:  # torch in the same process needs some of a GPU's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    rows = list(measure(SUITES[SUITE.value], PEER.value, wanted))
    if not rows:
        raise InputError(f"--only={ONLY.value}: no figure of suite {SUITE.value} matches")
    Console(soft_wrap=not sys.stdout.isatty()).print(table(rows))
    if OUT.value:
        write_json(OUT.value, record(SUITE.value, rows))
        print(f"written: {OUT.value}")


if __name__ == "__main__":
    cli.run(main)
