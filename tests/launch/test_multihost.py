"""The recipe on one device, on 8 and on 2 processes; what --multihost refuses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from absl import flags
from ml_collections import config_flags

from configs import base
from launch import cli, multihost
from moejax.core.errors import InputError
from moejax.io import processes
from moejax.train.log import read_metrics
from tests import fake_devices, tiny_run

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


def parsed(*words: str) -> flags.FlagValues:
    found = flags.FlagValues()
    flags.DEFINE_string("multihost", "", "", flag_values=found)
    flags.DEFINE_string("workdir", None, "", flag_values=found)
    flags.DEFINE_multi_string("prompt", [], "", flag_values=found)
    flags.DEFINE_bool("dry_run", False, "", flag_values=found)
    with mock.patch.object(sys, "argv", ["train", *words]):  # where keys of a config are found
        config_flags.DEFINE_config_dict("config", base.get_config(), flag_values=found)
        found(sys.argv)
    return found


def alike(monkeypatch, *others: list[str]) -> None:
    """What the first of the processes with these command lines says of the rest."""
    texts = [json.dumps(multihost._settings(parsed(*words))).encode() for words in others]
    monkeypatch.setattr(processes, "all_bytes", lambda data: texts)
    monkeypatch.setattr(multihost.flags, "FLAGS", parsed(*others[0]))
    multihost._check_alike()


def test_processes_are_alike_however_long_and_in_whatever_form_their_flags_are(monkeypatch):
    long = [f"--prompt={i:03} {'x' * 100}" for i in range(30)]
    first = ["--multihost", "HOST:1,2,0", "--workdir=a", *long]
    alike(monkeypatch, first, ["--multihost=HOST:1,2,1", *long, "--workdir", "a"])


@pytest.mark.parametrize(
    "words, said",
    [
        (["--workdir=b"], r"process 1 has another --workdir \(a here, b there\): start all"),
        (["--workdir=a", "--dry_run"], r"another --dry_run \(unset here, True there\)"),
        (["--workdir=a", "--config.train.lr=3"], r"--config.train.lr \(5e-05 here, 3.0 there\)"),
    ],
)
def test_a_flag_that_differs_is_named(monkeypatch, words, said):
    with pytest.raises(InputError, match=said):
        alike(monkeypatch, ["--workdir=a"], words)


ALONE = {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "4", "SLURM_GPUS_ON_NODE": "8"}
EIGHT = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "8"}


@pytest.mark.parametrize(
    "variables, own",
    [
        ({}, False),
        (ALONE, True),
        (ALONE | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, False),
        (EIGHT, False),
        (EIGHT | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, False),
        (EIGHT | {"CUDA_VISIBLE_DEVICES": "3"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, False),
    ],
)
def test_the_only_process_of_a_host_has_all_of_its_gpus(monkeypatch, variables, own):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "CUDA_", "JAX_LOCAL")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert multihost.sees_its_own_devices() is own


STARTED = """
import os, signal, time
from jax._src import xla_bridge
from launch import cli, multihost
def main(argv):
    multihost.start()
    print("GPUs", xla_bridge.CUDA_VISIBLE_DEVICES.value, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    print("nobody heard the signal", flush=True)
cli.run(main)
"""


def test_a_task_of_slurm_has_all_gpus_and_hears_sigterm():
    """By its default jax takes one GPU, that of SLURM_LOCALID, and the signal for itself."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    task = {"SLURM_JOB_ID": "17", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_PROCID": "0"}
    task |= {"SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
    task |= {"JAX_COORDINATOR_PORT": str(port), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", STARTED, "--multihost=auto", "--compile_cache="],
        cwd=ROOT,
        env=os.environ | task,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "GPUs all" in done.stdout, done.stdout + done.stderr
    assert done.returncode == cli.EXIT_PREEMPTED and "nobody" not in done.stdout, done.stderr
    assert "start the same command again" in done.stderr and done.stderr.count("\n") == 1


def start(devices: int, command: list[str]) -> subprocess.Popen[str]:
    env = fake_devices.environment(devices)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)


def losses(workdir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(workdir) if "loss" in record]


STOPPED = """
import sys
from pathlib import Path
from tests import faults
row = faults.Table(Path(sys.argv[1])).stopped()
print(row, flush=True)
sys.exit(not row.good)
"""


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_at_one_step_and_they_go_on(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STOPPED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    logs = [path.read_text()[-1500:] for path in sorted(tmp_path.glob("*.log"))]
    assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *logs])


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
