"""`launch.compile` as a user runs it: the plan of a real step on chips that are not here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = ["-m", "launch.compile", "--config=configs/quickstart_sft.py"]
COMMAND += ["--config.model.source=preset:smollm2-135m", "--config.compute.dtype=bfloat16"]


def plan(*arguments):
    return subprocess.run(
        [sys.executable, *COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=ROOT,
    )


@pytest.mark.aot
def test_the_plan_adds_up(tmp_path):
    out = tmp_path / "plan.json"
    rows = ("--config.train.batch_size=8", "--config.data.seq_len=1024")
    done = plan("--topology=v5p:2x2x1", *rows, "--config.compute.remat=full", f"--out={out}")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    found, hbm = record["plan"], record["plan"]["hbm"]
    assert record["mesh"] == {"data": 1, "fsdp": 4, "expert": 1, "tensor": 1}
    parts = ("params", "optimizer", "batch", "gradients", "activations", "buffers")
    assert hbm["used"] == sum(hbm[name] for name in parts) and not hbm["estimated"]
    assert hbm["used"] + hbm["left"] == hbm["capacity"] and found["fits"]
    assert 134e6 < hbm["params"] < 150e6  # 4 x 134.5M / 4, and norms on every device
    # Full remat computes the blocks' forward pass twice, the head's too: at most 4 / 3.
    assert 1.0 < found["compiled_flops"] / found["model_flops"] < 1.45
    assert not found["unknown_kernels"] and found["open_loops"] == 0
    kinds = {row["kind"]: row for row in found["moved"]}
    gathers = kinds["all-gather"]
    assert gathers["overlapped_bytes"] > 0.4 * gathers["sent_bytes"], gathers
    assert "reduce-scatter" in kinds
    line = found["roofline"]
    assert line["step_s"] == max(line["compute_s"], line["memory_s"], line["network_s"])
    assert found["tokens_per_s"] == pytest.approx(8 * 1024 / line["step_s"])
    assert "upper bounds" in done.stdout and "splash" not in done.stdout


@pytest.mark.aot
def test_what_does_not_fit_says_what_to_change(tmp_path):
    out = tmp_path / "plan.json"
    rows = ("--config.train.batch_size=256", "--config.data.seq_len=2048")
    done = plan("--topology=v5e:2x2", *rows, f"--out={out}")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    assert not record["plan"]["fits"]
    assert record["plan"]["required_bytes"] > record["plan"]["hbm"]["capacity"]
    assert record["remedies"] and record["remedies"][-1]["fits"]
    assert "it does not fit" in done.stdout and "  1. --config." in done.stdout


def test_bad_input_is_one_line():
    for arguments, said in (
        ((), "--topology is missing"),
        (("--topology=v9:2",), "is no topology"),
        (("--topology=v5p:2x2x1", "--out=/nowhere/plan.json"), "its folder is missing"),
    ):
        done = plan(*arguments)
        assert done.returncode == 2 and said in done.stderr, (arguments, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1
