"""moejax: one lineage of pure functions over one parameter tree, from a checkpoint to a checkpoint.

    import moejax as mj
    model = mj.load(path)                    # a Hugging Face folder, a hub id, GGUF, or our own
    model.logits(tokens)                     # int [B, T] -> float32 [B, T, V]
    model.generate(["Why is the sky blue?"])
    moe = mj.upcycle(model, experts=8, top_k=6)
    dense = mj.merge(moe, lam=0.75)
    dense.save(folder)

Arrays are named with their logical shape: B batch, T query tokens, S key tokens, N flat tokens,
K experts per token, R routed rows, E experts, J routed experts, D model, F feed-forward, H heads,
G key-value heads, C head size, V vocabulary, L layers, U units of a mask (heads, or blocks of
neurons). Inside shard_map the same letters carry the prefix ``local_``. Importing this package
touches no device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moejax.api import Model, interpolate, load, merge, upcycle

__all__ = ["Model", "interpolate", "load", "merge", "upcycle"]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `import moejax.core.tree` stays cheap.
    if name in __all__:
        from moejax import api

        return getattr(api, name)
    raise AttributeError(f"module 'moejax' has no attribute {name!r}")
