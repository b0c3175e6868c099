"""What a compiler is told, by the mesh and the environment."""

import types

import jax
import numpy as np
import pytest

from moejax.core.mesh import make_mesh
from moejax.core.platform import overlap_options


def on(platform, size=2):
    device = types.SimpleNamespace(platform=platform)
    return types.SimpleNamespace(size=size, devices=np.array([device] * size))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("MOEJAX_OVERLAP", "LIBTPU_INIT_ARGS"):
        monkeypatch.delenv(name, raising=False)


def test_only_a_mesh_of_tpus_is_told_to_overlap(monkeypatch):
    found = overlap_options(on("tpu"))
    assert found and set(found.values()) == {"true"}
    assert "xla_tpu_enable_async_all_to_all" in found
    for mesh in (None, on("tpu", 1), on("gpu"), make_mesh(devices=jax.devices()[:1])):
        assert overlap_options(mesh) is None
    monkeypatch.setenv("MOEJAX_OVERLAP", "0")
    assert overlap_options(on("tpu")) is None


def test_what_the_environment_says_is_left_alone(monkeypatch):
    words = "--xla_tpu_enable_async_all_to_all=false --xla_jf_dump_to=/tmp/x"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", words)
    found = overlap_options(on("tpu"))
    assert found and "xla_tpu_enable_async_all_to_all" not in found
    assert "xla_tpu_enable_async_collective_fusion" in found
