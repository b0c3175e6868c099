"""What a caller puts into the decoder without the decoder knowing what it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

# (number of the block in the whole model, its output [B, T, D], what rides along) -> the last two.
# The number is an int where layers are walked one by one, and traced where they are scanned.
After = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]
# (the block's part of `Inserted.layers`, what one place of the block holds) -> (what is used
# instead, what the caller wants to see of it: arrays, or None).
Change = Callable[[Any, jax.Array], tuple[jax.Array, Any]]

OnPlace = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Inserted:
    """Functions run inside `moejax.models.transformer.forward`, differentiated with it.

    Attributes:
      before: token embeddings [B, T, D], before learned positions are added, to what is used
        instead of them.
      after: see `After`; called after every block.
      kept: arrays that ride along from block to block; `Output.kept` has them after the last one.
      heads: changes what each head mixed, [B, T, H, C], before the output projection.
      neurons: changes each neuron's activation before the down projection: act(gate) * up or
        act(up), [B, T, F]; of experts [B, T, E, F], zero where a token did not choose one.
      attn_in, mlp_in: change the normed input of attention, and of the feed-forward layer or the
        experts, [B, T, D]. gate: changes act(gate), or act(up) without a gate, before all else.
      layers: per run of layers, arrays [L, ...] of which each block gets its own part.
    `Output.seen` has, per run and place, what these functions returned second, stacked over layers.
    """

    before: Callable[[jax.Array], jax.Array] | None = None
    after: After | None = None
    kept: Any = None
    heads: Change | None = None
    neurons: Change | None = None
    attn_in: Change | None = None
    mlp_in: Change | None = None
    gate: Change | None = None
    layers: Mapping[str, Any] | None = None

    def of_run(self, name: str) -> Any:
        """A run's part of `layers`."""
        return None if self.layers is None else self.layers[name]

    def inside(self, part: Any) -> tuple[Callable[[str], OnPlace | None], dict[str, Any]]:
        """What to call at a place of a block with this part, and a dict that fills meanwhile."""
        seen: dict[str, Any] = {}

        def at(place: str) -> OnPlace | None:
            change: Change | None = getattr(self, place)
            if change is None:
                return None

            def changed(x: jax.Array) -> jax.Array:
                x, seen[place] = change(part, x)
                return x

            return changed

        return at, seen


def changed(change: OnPlace | None, x: jax.Array) -> jax.Array:
    """What a place uses instead of x."""
    return x if change is None else change(x)


def composed(first: OnPlace, then: OnPlace | None) -> OnPlace:
    """x -> then(first(x)); first alone without `then`."""
    return first if then is None else lambda x: then(first(x))
