"""Numeric types, named once, and how close each of them lets two computations be."""

from __future__ import annotations

import dataclasses

# Largest difference relative to the largest value, for two correct ways of computing one thing.
TOLERANCE: dict[str, float] = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtype names: parameters at rest, arithmetic, sums, and the router's logits."""

    param: str = "float32"
    compute: str = "float32"
    accum: str = "float32"
    router: str = "float32"
