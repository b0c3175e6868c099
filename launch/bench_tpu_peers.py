"""The peers' TPU kernels: jax's megablox, and tokamax's, which is made of it.

Both visit tiles of rows, one that two groups share for each of them, and pad depth and columns to
whole tiles. `launch.bench_megablox` counts what a visit costs.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NamedTuple

from moejax.core.errors import InputError


class Peer(NamedTuple):
    """A package, the module of its kernels, the branch that computes, and how many cores it has.

    tilings: per product, rows, depth and columns of tiles; the first are its defaults.
    """

    package: str
    module: str
    computes: str
    cores: int
    tilings: dict[str, tuple[tuple[int, int, int], ...]]


DEFAULT = (128, 128, 128)
PEERS = {
    # Halves of the matrix for two cores, short and tall.
    "megablox": Peer(
        "jax",
        "jax.experimental.pallas.ops.tpu.megablox.gmm",
        "_do",
        2,
        {
            "forward": (DEFAULT, (128, 2048, 768), (256, 2048, 768)),
            "dx": (DEFAULT, (128, 1408, 1024), (256, 1408, 1024)),
            "dW": (DEFAULT, (128, 1024, 768), (256, 1024, 768)),
        },
    ),
    # Its pipeline is inside a kernel without a grid, which a v5p runs on one of its two cores.
    "tokamax": Peer(
        "tokamax",
        "tokamax._src.ops.ragged_dot.pallas_mosaic_tpu_kernel",
        "_stage2",
        1,
        {
            "forward": (DEFAULT, (128, 2048, 1408), (256, 2048, 768)),
            "dx": (DEFAULT, (128, 1408, 2048), (256, 1408, 1024)),
            "dW": (DEFAULT, (128, 1024, 768), (256, 1024, 768)),
        },
    ),
}


def lacks(name: str) -> str:
    """Why the peer is not here; empty if it is."""
    return "" if importlib.util.find_spec(PEERS[name].package) else "not installed"


def totals(counted: dict[str, Any], product: str, num_groups: int) -> list[float]:
    """Cycles of the busier core per draw: visits of the draw times the cycles of a visit.

    counted: "middle" and "ends", cycles of a visit whose steps are all in the middle of the sum of
    a tile, or all begin and end one; "steps" over the depth; "active" visits of each draw.
    """
    middle, ends = counted["middle"], counted["ends"]
    if product == "dW":  # sums over rows: one begins and ends with its group
        extra = num_groups * (ends - middle)
        return [active * middle + extra for active in counted["active"]]
    visit = middle + (ends - middle) / counted["steps"]
    return [active * visit for active in counted["active"]]


def put_in_place_of(implementation: str, name: str) -> None:
    """Lets `grouped_matmul`, in this process, call the peer by the name of an implementation.

    Tiles of 128 x 1024 x 1024, for all three products. Raises InputError for a peer that cannot be
    compiled for devices that are not here.
    """
    import jax.numpy as jnp

    from moejax.ops import grouped_matmul

    if name != "megablox":
        raise InputError(f"{name} asks the device at hand what it is, which is no TPU")
    ops = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.ops")

    def kernel(lhs, rhs, group_sizes, groups):
        rows = jnp.pad(lhs, ((0, -lhs.shape[0] % 128), (0, 0)))  # it takes whole tiles only
        out = ops.gmm(rows, rhs, group_sizes, lhs.dtype, (128, 1024, 1024))
        return out[: lhs.shape[0]]

    grouped_matmul._KERNELS[implementation] = kernel
