"""Tile sizes of the grouped GPU kernels, from the shape alone.

The model: a Hopper multiprocessor wants 128 rows per tile for its tensor cores and as many columns
as its registers hold; fewer rows where the mean group has fewer, because a tile's empty rows cost
as much as full ones. Of fourteen tiles timed on an H200 at the shapes of `launch.bench`'s GPU rows
these were the fastest or within the noise of it (2026-11-26). They spill no register.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tile:
    """A program makes m x n of the result, k of the sum at a time, with these warps and stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def rows_tile(num_rows: int, num_groups: int, num_cols: int, depth: int, itemsize: int) -> Tile:
    """For rows times their group's matrix: [num_rows, depth] x [num_groups, depth, num_cols]."""
    mean = -(-num_rows // num_groups)
    if itemsize == 4:
        return Tile(_fit(mean, 128), _fit(num_cols, 64), _fit(depth, 16), 4, 3)
    m = _fit(mean, 128)
    wide = 256 if m == 128 and num_cols >= 256 else 128
    n = _fit(num_cols, wide)
    return Tile(m, n, _fit(depth, 64), 8 if m * n > 128 * 128 else 4, 3 if m == 128 else 4)


def outer_tile(num_groups: int, k: int, n: int, itemsize: int) -> Tile:
    """For the gradient of the matrices [num_groups, k, n]; its k is the rows taken at a time."""
    if itemsize == 4:
        return Tile(_fit(k, 128), _fit(n, 64), 32, 4, 3)
    wide = Tile(_fit(k, 128), _fit(n, 256 if n >= 256 else 128), 64, 4, 3)
    return dataclasses.replace(wide, warps=8 if wide.m * wide.n > 128 * 128 else 4)


def _fit(size: int, most: int) -> int:
    """The power of two that holds `size`, from 16 (the tensor cores' least) to `most`."""
    return max(16, min(most, 1 << max(0, size - 1).bit_length()))
