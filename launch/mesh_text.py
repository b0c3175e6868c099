"""--mesh as serve and evaluate take it."""

from __future__ import annotations

from jax.sharding import Mesh

from moejax.core.errors import InputError
from moejax.core.mesh import AXES, make_mesh


def parse_mesh(text: str) -> Mesh:
    """The mesh of all devices that "fsdp=2,tensor=4" stands for."""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis.strip() not in AXES or not size.strip().isdigit():
            raise InputError(f"--mesh={text}: write axis=size, the axes are {', '.join(AXES)}")
        sizes[axis.strip()] = int(size)
    return make_mesh(*(sizes.get(axis, 1) for axis in AXES))
