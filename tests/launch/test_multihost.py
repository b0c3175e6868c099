"""The recipe on one device, on 8 and on 2 processes; what --multihost refuses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
from absl import flags

from launch import multihost
from moejax.core.errors import InputError
from moejax.train.log import read_metrics
from tests import tiny_run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "value, words",
    [
        ("host", "write auto or HOST:PORT,NUM,INDEX"),
        ("host:80,2", "write auto or HOST:PORT,NUM,INDEX"),
        ("host:80,2,2", "INDEX must lie between 0 and 1"),
    ],
)
def test_what_is_no_place_is_refused(value, words):
    with pytest.raises(InputError, match=words):
        multihost._parse(value)


def test_a_place():
    found = multihost._parse("10.0.0.2:9876,4,3")
    wanted = {"coordinator_address": "10.0.0.2:9876", "num_processes": 4, "process_id": 3}
    assert found == wanted
    assert "multihost_timeout" in flags.FLAGS and multihost.device_table() == []


def start(devices: int, command: list[str]) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)


def losses(workdir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(workdir) if "loss" in record]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "moe", "esft"])
def test_one_recipe_anywhere(tmp_path, model):
    tiny_run.write(tmp_path)
    found = {}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    places = [f"--multihost=127.0.0.1:{port},2,{index}" for index in (0, 1)]
    for name, devices, ranks in (("one", 1, [""]), ("eight", 8, [""]), ("two", 4, places)):
        workdir = tmp_path / name
        more = ["--config.train.steps=4", "--config.train.accumulation=1"]
        command = tiny_run.command(tmp_path, workdir, *more, model=model)
        started = [start(devices, [*command, place] if place else command) for place in ranks]
        for process in started:
            out, _ = process.communicate(timeout=500)
            assert process.returncode == 0, out[-3000:]
        found[name] = losses(workdir)
    assert len(found["one"]) == 4
    assert found["eight"] == pytest.approx(found["one"], rel=1e-5)
    assert found["two"] == pytest.approx(found["one"], rel=1e-5)
    if model == "esft":
        results = [json.loads((tmp_path / name / "result.json").read_text()) for name in found]
        for result in results[1:]:
            assert result["after"] == pytest.approx(results[0]["after"], rel=1e-5)
        assert (tmp_path / "two" / "delta" / "expert_cfg.json").exists()
    assert json.loads((tmp_path / "two" / "env.json").read_text())["process_count"] == 2
