"""`launch.compile` as a user runs it: the plan of a real step on chips that are not here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DENSE = ["--config=configs/quickstart_sft.py", "--config.model.source=preset:smollm2-135m"]
DENSE += ["--config.compute.dtype=bfloat16"]
# Of the configs of DeepSeek-V2-Lite everything but its sizes.
MIXTURE = ["--config.model.preset=smollm2-135m", "--config.model.experts=4"]
MIXTURE += ["--config.model.top_k=2"]  # one of both is shared
MIXTURE += ["--config.train.batch_size=8", "--config.train.accumulation=2"]
MIXTURE += ["--config.data.seq_len=512", "--config.mesh.fsdp=1", "--config.mesh.expert=4"]


def plan(*arguments, config=DENSE):
    return subprocess.run(
        [sys.executable, "-m", "launch.compile", *config, *arguments],
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


@pytest.mark.aot
@pytest.mark.parametrize(
    ("topology", "kernels"),
    [("h100x4", "gpu"), pytest.param("v5e:2x2", "tpu", marks=pytest.mark.slow)],
)
def test_esft_takes_the_state_of_its_experts_alone(tmp_path, topology, kernels):
    """A mixture's step of all parameters, and of one expert of a layer's four, on the same mesh."""
    found = {}
    for name in ("esft_deepseek_v2_lite", "esft/deepseek_v2_lite"):
        out = tmp_path / "plan.json"
        config = [f"--config=configs/{name}.py", *MIXTURE]
        config += [f"--config.compute.moe_implementation={kernels}"]
        config += ["--config.method.experts=spread:1"] if "/" in name else []
        done = plan(f"--topology={topology}", f"--out={out}", config=config)
        assert done.returncode == 0, done.stderr[-3000:]
        record = json.loads(out.read_text())
        assert record["mesh"]["expert"] == 4 and record["plan"]["fits"], record["mesh"]
        assert not record["plan"]["unknown_kernels"], record["plan"]["unknown_kernels"]
        assert any("all-to-all" in row["kind"] for row in record["plan"]["moved"]) or any(
            "permute" in row["kind"] for row in record["plan"]["moved"]
        )
        found[name] = record["plan"]["hbm"]
    whole, some = found.values()
    assert some["optimizer"] < 0.3 * whole["optimizer"] and some["used"] < whole["used"]


@pytest.mark.aot
@pytest.mark.slow
def test_a_sweep_compiles_its_best(tmp_path):
    out = tmp_path / "sweep.json"
    rows = ("--config.train.batch_size=8", "--config.data.seq_len=512")
    done = plan("--topology=v5e:2x2", "--sweep", "--compiles=1", *rows, f"--out={out}")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    compiled = [row for row in record["rows"] if row["compiled"]]
    assert len(compiled) == 1 and len(record["rows"]) > 5, record["rows"][:2]
    assert "compiled 1 of 1" in done.stdout


def test_bad_input_is_one_line():
    for arguments, said in (
        ((), "--topology is missing"),
        (("--topology=v9:2",), "is no topology"),
        (("--topology=v5p:2x2x1", "--out=/nowhere/plan.json"), "its folder is missing"),
    ):
        done = plan(*arguments)
        assert done.returncode == 2 and said in done.stderr, (arguments, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1
