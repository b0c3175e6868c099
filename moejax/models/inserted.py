"""What a caller puts into the decoder without the decoder knowing what it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

# (number of the block in the whole model, its output [B, T, D], what rides along) -> the last two.
# The number is an int where layers are walked one by one, and traced where they are scanned.
After = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Inserted:
    """Functions run inside `moejax.models.transformer.forward`, differentiated with it.

    Attributes:
      before: token embeddings [B, T, D], before learned positions are added, to what is used
        instead of them.
      after: see `After`; called after every block.
      kept: arrays that ride along from block to block; `Output.kept` has them after the last one.
    """

    before: Callable[[jax.Array], jax.Array] | None = None
    after: After | None = None
    kept: Any = None
