"""FLOPs of the Pallas kernels in a compiled program, by their names and the shapes they take.

A program's text says of a kernel no more than that; XLA's own count leaves it out.
"""

from __future__ import annotations

import math

# (dtype, dims) of an array.
Array = tuple[str, tuple[int, ...]]
_FLOATS = ("bf16", "f16", "f32")
_SPLASH_BLOCK = 512
# Products of queries and keys (size C), and of weights and values (size V), in each pass.
_SPLASH = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}


def kernel_flops(name: str, operands: list[Array], results: list[Array]) -> float | None:
    """Of one call of the kernel in the `name` of its instruction; None for an unknown kernel.

    splash_mha_*: 2 T S (a C + b V) per head, of which a causal mask's blocks are visited; windows
    and segments that leave out more are not seen, so this is an upper bound. grouped_*: 2 R K N for
    every stack of matrices [E, K, N] read or written, with all R rows of the buffer, whether they
    hold a token or not.
    """
    if "splash_m" in name:
        return _splash(name, [dims for dtype, dims in operands if dtype in _FLOATS])
    if "grouped_" in name:
        arrays = [dims for dtype, dims in [*operands, *results] if dtype in _FLOATS]
        rows = max((dims[0] for dims in arrays if len(dims) == 2), default=0)
        return 2.0 * rows * sum(dims[1] * dims[2] for dims in arrays if len(dims) == 3)
    return None


def _splash(name: str, floats: list[tuple[int, ...]]) -> float | None:
    found = [dims for dims in floats if len(dims) >= 3][:3]
    passed = next((part for part in _SPLASH if f"_{part}_" in f"{name}_"), None)
    if passed is None or len(found) < 3:
        return None
    q, k, v = found
    keys, values = _SPLASH[passed]
    num_blocks = max(1, q[-2] // _SPLASH_BLOCK)
    visited = (num_blocks + 1) / (2 * num_blocks)
    pairs = math.prod(q[:-1]) * k[-2] * visited
    return 2.0 * pairs * (keys * q[-1] + values * v[-1])
