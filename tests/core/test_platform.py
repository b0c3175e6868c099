"""What a compiler is told."""

import types

import jax
import numpy as np
import pytest

from moejax.core.mesh import make_mesh
from moejax.core.platform import compiling_for, overlap_options, takes_gpu_kernels


def on(platform, size=2):
    device = types.SimpleNamespace(platform=platform)
    return types.SimpleNamespace(size=size, devices=np.array([device] * size))


def test_only_a_mesh_of_tpus_is_told_to_overlap():
    found = overlap_options(on("tpu"))
    assert found and set(found.values()) == {"true"}
    assert "xla_tpu_enable_async_all_to_all" in found
    for mesh in (None, on("tpu", 1), on("gpu"), make_mesh(devices=jax.devices()[:1])):
        assert overlap_options(mesh) is None


CAPABILITIES = {"9.0": True, "10.3": True, "8.0": False, "12.0": False, "gfx942": False, "": False}


@pytest.mark.parametrize(("capability", "is_one"), CAPABILITIES.items())
def test_data_centre_gpus_since_hopper_have_the_shared_memory(monkeypatch, capability, is_one):
    assert not takes_gpu_kernels()  # a CPU
    with compiling_for("gpu"):
        assert takes_gpu_kernels()  # ahead of time
        device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [device])
        assert takes_gpu_kernels() == is_one
