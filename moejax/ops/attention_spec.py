"""Which keys a query sees."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

Window = int | jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visible:
    """A query in slot i of its row sees the key in slot j <= i, if nothing below forbids it.

    Attributes:
      slot: int32 scalar, slot of the first query; None: 0, queries and keys are the same tokens.
        With pages int32 [B], one for each row.
      start_B: int32 [B], the first slot of each row that is no padding; None: 0.
      segments_BT: int32, of packed rows: a query sees its own segment only. Not with `slot`.
      mask_BTS: bool, all of the above written out, where a caller has it: layers then share it.
      pages_BP: int32, the pages of each row in order, where keys and values are a pool of pages
        (`moejax.ops.attention_paged`). Only with `slot`.
      groups_K: int32, which of the pool's groups of keys the queries' heads share; None: all. Only
        with `pages_BP`: no other group is read.
    """

    slot: jax.Array | None = None
    start_B: jax.Array | None = None
    segments_BT: jax.Array | None = None
    mask_BTS: jax.Array | None = None
    pages_BP: jax.Array | None = None
    groups_K: jax.Array | None = None


def mask_of(visible: Visible, num_queries: int, num_keys: int, window: Window = 0) -> jax.Array:
    """bool [B or 1, T, S], true where a query sees a key; a window of 0 is none."""
    mask = visible.mask_BTS
    if mask is not None and isinstance(window, int) and window == 0:
        return mask
    queries_T, keys_S = slots_of(visible, num_queries), jnp.arange(num_keys)
    if mask is None:
        segments = visible.segments_BT
        mask = block_mask(visible, queries_T, keys_S, segments, segments)
    return mask & in_window(queries_T, keys_S, window)


def slots_of(visible: Visible, num_queries: int) -> jax.Array:
    """int32 [T], the slot of each query."""
    index_T = jnp.arange(num_queries)
    return index_T if visible.slot is None else visible.slot + index_T


def block_mask(visible: Visible, queries_T, keys_S, q_segments_BT, k_segments_BS) -> jax.Array:
    """bool [B or 1, T, S] for queries and keys in these slots, without a window."""
    mask = (queries_T[:, None] >= keys_S[None, :])[None]
    if visible.start_B is not None:
        mask = mask & (keys_S[None, None, :] >= visible.start_B[:, None, None])
    if visible.segments_BT is not None:
        mask = mask & (q_segments_BT[:, :, None] == k_segments_BS[:, None, :])
    return mask


def in_window(queries_T, keys_S, window: Window) -> jax.Array:
    """bool [1, T, S], true where the key is among the query's last `window` slots."""
    return (queries_T[:, None] - keys_S[None, :] < limit_of(window))[None]


def limit_of(window: Window):
    """The window in slots, with 0 (none) turned into more than any text has."""
    return jnp.where(jnp.asarray(window) > 0, window, jnp.iinfo(jnp.int32).max)


def soft_capped(scores, soft_cap: float | None):
    """cap * tanh(scores / cap) (Gemma 2, arXiv 2408.00118, section 2); unchanged without a cap."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
