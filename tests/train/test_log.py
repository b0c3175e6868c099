"""Console lines, records and the peak that speeds are given against."""

from __future__ import annotations

import time

import numpy as np
import pytest

from moejax.train import peak
from moejax.train.log import (
    METRICS_FILE,
    RunLog,
    format_duration,
    format_line,
    load_imbalance,
    read_metrics,
    truncate_metrics,
)

RECORD = {
    "step": 3,
    "step_s": 2.0,
    "loss": 1.23456,
    "lr": 5e-5,
    "grad_norm": 0.789,
    "tokens_per_s": 1234.5,
    "gflops": 98.7,
    "mfu": 0.612,
    "load_max": 1.345,
}


def test_a_line_shows_what_is_known():
    assert format_line(RECORD, 20, 34.0) == (
        "step 3/20  loss 1.2346  lr 5.00e-05  grad 0.789  1,234 tok/s  99 GFLOP/s  MFU 61%  "
        "load 1.34  ETA 0:34"
    )
    assert format_line({"step": 1, "loss": 2.0}, 5) == "step 1/5  loss 2.0000"


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (59.2, "1:00"), (61, "1:01"), (3600, "1:00:00"), (-1, "0:00")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_load_imbalance_is_that_of_the_worst_layer():
    assert load_imbalance(np.array([[4.0, 4.0, 4.0], [6.0, 3.0, 0.0]])) == 2.0
    assert load_imbalance(np.ones((2, 3))) == 1.0


def test_lines_without_a_terminal_are_plain_with_an_eta(tmp_path, capsys):
    with RunLog(tmp_path, "moe", 20, 0, quiet=False) as log:
        log.train(RECORD | {"step": 1, "step_s": 60.0}, show=True)  # compiles
        log.train(RECORD | {"step": 2}, show=False)
        log.train(RECORD, show=True)
        log.evaluation({"step": 3, "eval/nll": 1.5})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.startswith("[moe] step ") for line in lines)
    assert lines[0].endswith("ETA 19:00") and lines[1].endswith("ETA 0:34")
    assert lines[2] == "[moe] step 3/20  eval/nll 1.5000"
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 3]


def test_quiet_writes_records_only(tmp_path, capsys):
    with RunLog(tmp_path, "moe", 20, 0, quiet=True) as log:
        log.train(RECORD, show=True)
    assert capsys.readouterr().out == ""
    assert read_metrics(tmp_path) == [RECORD]


def test_truncation_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval/nll": 1.0}\n{"step": 3}\n{"ste')
    assert len(read_metrics(tmp_path)) == 4
    truncate_metrics(tmp_path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "eval/nll": 1.0}\n'


def test_peak_is_measured_and_plausible():
    found = peak.measure_gemm_peak("float32", budget_s=0.05)
    assert 0.5 < found.gflops < 1e7 and found.dtype == "float32" and found.size >= 512
    assert peak.measure_gemm_peak("float32", budget_s=0.05) is found


def test_what_compiling_takes_is_not_of_the_peaks_budget(monkeypatch):
    """A GPU's first product loads libraries for longer than that: no second size was tried."""
    sizes = set()

    def multiply(x, y):
        if len(x) not in sizes:
            time.sleep(0.1)
        sizes.add(len(x))
        return x

    monkeypatch.setattr(peak.jax, "jit", lambda function: multiply)
    monkeypatch.setattr(peak, "MAX_SIZE", 1024)
    assert peak.measure_gemm_peak.__wrapped__("float32", 0.05).size == 1024
    assert sizes == {512, 1024}
