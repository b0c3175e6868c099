"""Accelerators that are not here, by name: "v5p:2x2x2" (TPU, chips per dimension), "h100x8" (GPUs).

libtpu and the CUDA plugin compile for such a topology on any Linux host. libtpu reads its
environment when it is loaded, so a program for a topology runs in a process of its own:

    subprocess.run(command, env={**os.environ, **environment("v5p:2x2x2")})
"""

import importlib.util
import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from moejax.core.errors import InputError

INSTALL = "pip install -e .[aot]"
# Chip generation -> its name in TPU_ACCELERATOR_TYPE and the dimensions of its network.
_TPUS = {"v5e": ("v5litepod-4", 2), "v5p": ("v5p-8", 3), "v6e": ("v6e-4", 2)}
_MAX_H100 = 8  # one host
# What XLA has to know of an H100 SXM with 80 GB, in the fields of its GpuTargetConfigProto; the
# figures are those the CUDA driver reports on such a card.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: 84942979072
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
"""


def environment(name: str) -> dict[str, str]:
    """Variables a process needs before it imports jax to compile for the topology `name`."""
    _check_installed(name)
    accelerator = _TPUS[name.partition(":")[0]][0] if ":" in name else "v5p-8"
    return {
        "JAX_PLATFORMS": "cpu",  # the host's own device; the topology is asked for by name
        "TPU_SKIP_MDS_QUERY": "1",  # no look-up of a cloud machine's description
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": accelerator,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # a second process would stop at a lock file
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def missing(name: str) -> str | None:
    """What has to be installed to compile for the topology `name`; None when nothing."""
    _check_name(name)
    wanted = ("libtpu",) if ":" in name else ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc")
    for module in wanted:
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # the package it would be in is not there either
            found = False
        if not found:
            return module
    return None


def devices(name: str) -> list[jax.Device]:
    """The topology's devices: to build a mesh of and compile for, never to run on.

    Raises InputError for a name that is no topology, or when its compiler is not installed.
    """
    _check_installed(name)
    if ":" in name:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    count = int(name.partition("x")[2])
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology=f"1x1x{count}", target_config=_H100
    )
    return list(described.devices)


def mesh(name: str, axes: Mapping[str, int]) -> Mesh:
    """The topology's devices as a mesh, e.g. mesh("v5p:2x2x2", {"fsdp": 2, "expert": 4}).

    Raises InputError when the sizes do not multiply to the number of devices.
    """
    found = devices(name)
    if math.prod(axes.values()) != len(found):
        raise InputError(
            f"mesh {dict(axes)} takes {math.prod(axes.values())} devices and {name} has "
            f"{len(found)}; the sizes must multiply to that."
        )
    return Mesh(np.asarray(found).reshape(tuple(axes.values())), tuple(axes))


def _check_name(name: str) -> None:
    generation, colon, shape = name.partition(":")
    if colon and generation in _TPUS:
        num_dims = _TPUS[generation][1]
        if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) and shape.count("x") + 1 == num_dims:
            return
    elif re.fullmatch(r"h100x[1-9]\d*", name) and int(name[5:]) <= _MAX_H100:
        return
    raise InputError(
        f"{name!r} is no topology: give v5e:AxB, v5p:AxBxC, v6e:AxB (chips per dimension) or "
        f"h100xN with N up to {_MAX_H100}."
    )


def _check_installed(name: str) -> None:
    lacking = missing(name)
    if lacking:
        raise InputError(f"compiling for {name} needs {lacking}, not installed here: {INSTALL}")
