"""What one chip has: memory, and how fast it computes, reads and sends. Published peaks."""

import dataclasses

from moejax.core.errors import InputError
from moejax.core.memory import GIB


@dataclasses.dataclass(frozen=True)
class Chip:
    """hbm_bytes: what a program may use. Per second: bf16 operations of the matrix units, bytes of
    HBM, and bytes in one direction over all of its links to other chips. lanes: of one row of a
    tile, the least that a device should have of a width that is split; 1: there are no tiles."""

    name: str
    hbm_bytes: int
    flops_per_s: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    lanes: int = 128


# Rates: Google Cloud's TPU pages (links: v5e 1,600 and v6e 3,200 Gbit/s, v5p 1,200 GB/s both ways)
# and NVIDIA's H100 data sheet (SXM). Sizes of the TPUs: what libtpu 0.0.42 lets a program use; of
# the H100: what CUDA reports of 80 GB.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", int(15.75 * GIB), 1.97e14, 8.19e11, 2.0e11),
        Chip("v5p", int(95.74 * GIB), 4.59e14, 2.765e12, 6.0e11),
        Chip("v6e", int(31.25 * GIB), 9.18e14, 1.64e12, 4.0e11),
        Chip("h100", 84_942_979_072, 9.89e14, 3.352e12, 4.5e11, lanes=1),
    )
}


# Parts of the names that devices have for themselves, the longer first.
_KINDS = {"v5 lite": "v5e", "v5": "v5p", "v6": "v6e", "h100": "h100"}


def chip_of_kind(kind: str) -> Chip | None:
    """The chip of a device's own name ("TPU v5 lite"); None for any that is not known."""
    return next((CHIPS[name] for part, name in _KINDS.items() if part in kind.lower()), None)


def chip_of(topology: str) -> Chip:
    """The chip of a topology's name ("v5p:2x2x2", "h100x8"); InputError for any other."""
    name = "h100" if topology.startswith("h100") else topology.partition(":")[0]
    if name not in CHIPS:
        raise InputError(f"no chip {name!r}: there are {', '.join(CHIPS)}")
    return CHIPS[name]
