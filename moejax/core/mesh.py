"""The device mesh: its four axes, in the order of slower to faster networks."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from moejax.core.errors import InputError

AXES = ("data", "fsdp", "expert", "tensor")
# Tokens are split over these; "tensor" sees the same tokens on each device.
TOKEN_AXES = ("data", "fsdp", "expert")


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of all devices (or those given); InputError unless the sizes multiply to their number.

    data: pure replication.  fsdp: weights split, gathered at use.  expert: experts split, tokens
    travel.  tensor: widths split, results summed.
    """
    found = jax.devices() if devices is None else devices
    sizes = (data, fsdp, expert, tensor)
    if min(sizes) < 1 or math.prod(sizes) != len(found):
        raise InputError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} takes {math.prod(sizes)} devices and "
            f"there are {len(found)}: the sizes must be positive and multiply to that."
        )
    return Mesh(np.asarray(found).reshape(sizes), AXES)


def check_axes(mesh: Mesh) -> None:
    """InputError unless the mesh has the four axes (in any order)."""
    lacking = [axis for axis in AXES if axis not in mesh.shape]
    if lacking:
        raise InputError(
            f"the mesh has {len(mesh.shape)} axes {tuple(mesh.shape)} and lacks {lacking} of the "
            f"{len(AXES)} in {AXES}: build it by moejax.core.mesh.make_mesh, sizes of 1 included."
        )
