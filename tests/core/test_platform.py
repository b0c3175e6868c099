"""What a compiler is told."""

import types

import jax
import numpy as np

from moejax.core.mesh import make_mesh
from moejax.core.platform import overlap_options


def on(platform, size=2):
    device = types.SimpleNamespace(platform=platform)
    return types.SimpleNamespace(size=size, devices=np.array([device] * size))


def test_only_a_mesh_of_tpus_is_told_to_overlap():
    found = overlap_options(on("tpu"))
    assert found and set(found.values()) == {"true"}
    assert "xla_tpu_enable_async_all_to_all" in found
    for mesh in (None, on("tpu", 1), on("gpu"), make_mesh(devices=jax.devices()[:1])):
        assert overlap_options(mesh) is None
