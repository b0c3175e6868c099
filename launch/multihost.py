"""Several processes as one run: who they are, how long they wait for each other, what they have."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from launch import cli
from moejax.core.errors import InputError

# jax is imported by what uses it: --help should not wait for it.

MULTIHOST = flags.DEFINE_string(
    "multihost",
    "",
    "auto: the cluster (TPU pod, Slurm, GKE, MPI) says who is who. HOST:PORT,NUM,INDEX: process "
    "INDEX of NUM, process 0 listens at HOST:PORT. Empty: this process alone.",
)
MULTIHOST_TIMEOUT = flags.DEFINE_integer(
    "multihost_timeout", 1800, "Seconds that processes wait for each other to start."
)
MULTIHOST_HEARTBEAT = flags.DEFINE_integer(
    "multihost_heartbeat", 100, "Seconds without a sign of life after which a process is given up."
)
_PLACE = re.compile(r"(?P<host>[\w.\-\[\]:]+):(?P<port>\d+),(?P<num>\d+),(?P<index>\d+)")


def start() -> None:
    """Joins the other processes, if --multihost says that there are any. Before any device is used.

    Errors: InputError for a value that is none, a cluster that is not recognised, processes that
    did not come within the timeout.
    """
    value = MULTIHOST.value
    if not value:
        return
    import jax

    arguments: dict[str, Any] = {} if value == "auto" else _parse(value)
    if sees_its_own_devices():
        arguments["local_device_ids"] = []  # all that are visible
    arguments["initialization_timeout"] = MULTIHOST_TIMEOUT.value
    arguments["heartbeat_timeout_seconds"] = MULTIHOST_HEARTBEAT.value
    # What CPU devices of several processes talk by; other platforms do not ask.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        remedy = "write --multihost=HOST:PORT,NUM,INDEX" if value == "auto" else "check the address"
        raise InputError(
            f"--multihost={value}: the processes did not come together within "
            f"{MULTIHOST_TIMEOUT.value} s (--multihost_timeout): {reason}; {remedy}, and see that "
            "every process was started and reaches process 0"
        ) from error
    # jax listens for SIGTERM too, and what handled it before would never hear of it.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    _check_alike()


def sees_its_own_devices() -> bool:
    """Whether all GPUs that this process sees are its own, as Slurm's or MPI's variables say.

    Under these, and without JAX_LOCAL_DEVICE_IDS, JAX takes each process to be one of as many on
    its host as there are GPUs, and gives it one. That is wrong for the only process of a host, and
    for one that Slurm has bound to some.
    """
    found = os.environ
    if "JAX_LOCAL_DEVICE_IDS" in found:
        return False
    if found.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1":
        return True
    if "SLURM_STEP_NUM_NODES" not in found:
        return False
    if found.get("SLURM_NTASKS") == found["SLURM_STEP_NUM_NODES"]:
        return True
    visible, of_host = found.get("CUDA_VISIBLE_DEVICES"), found.get("SLURM_GPUS_ON_NODE", "")
    return visible is not None and of_host.isdigit() and len(visible.split(",")) < int(of_host)


def device_table() -> list[str]:
    """One line per process: host, pid, devices. All processes call it; the first prints it."""
    import jax

    from moejax.io import processes

    devices = jax.local_devices()
    ids = ",".join(str(device.id) for device in devices[:8]) + (",..." if len(devices) > 8 else "")
    mine = (
        f"{jax.process_index():>4}  {socket.gethostname():<24.24} {os.getpid():>8}  "
        f"{len(devices):>3} x {devices[0].device_kind:<20.20} {ids}"
    )
    if jax.process_count() == 1:
        return []
    head = f"rank  {'host':<24} {'pid':>8}  {'devices':<26} ids"
    return [head, *processes.texts(mine)]


def say(text: str) -> None:
    """Prints a line on the first process only."""
    from moejax.io import processes

    if processes.is_first():
        print(text, flush=True)


def _parse(value: str) -> dict[str, Any]:
    found = _PLACE.fullmatch(value)
    if not found:
        raise InputError(f"--multihost={value}: write auto or HOST:PORT,NUM,INDEX")
    num, index = int(found["num"]), int(found["index"])
    if not 0 <= index < num:
        raise InputError(f"--multihost={value}: INDEX must lie between 0 and {num - 1}")
    if num > 1 and found["host"] in ("localhost", "127.0.0.1", "[::1]") and index == 0:
        print("the coordinator is this machine's loopback: all processes must run here", flush=True)
    place = f"{found['host']}:{found['port']}"
    return {"coordinator_address": place, "num_processes": num, "process_id": index}


def _check_alike() -> None:
    """Processes of different flags or versions would hang in the first step that differs."""
    from moejax.io import processes

    own = _settings(flags.FLAGS)
    for index, text in enumerate(processes.all_bytes(json.dumps(own).encode())):
        other = json.loads(text)
        differing = [
            f"{name} ({own.get(name, 'unset')} here, {other.get(name, 'unset')} there)"
            for name in sorted(own | other)
            if own.get(name) != other.get(name)
        ]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise InputError(
                f"process {index} has another {', '.join(differing[:3])}{more}: start all with the "
                "same versions and flags"
            )


def _settings(given: flags.FlagValues) -> dict[str, str]:
    """What has to be the same in all processes: flags that were given, every key of a config."""
    import jax

    found = {"jax": jax.__version__}
    for name in given:
        value = given[name].value
        if isinstance(value, ConfigDict):
            for key in cli.leaf_keys(value):
                found[f"--{name}.{key}"] = str(cli.leaf(value, key))
        elif given[name].present and not name.startswith("multihost"):
            found[f"--{name}"] = str(value)
    return found
