"""Keys and values of the tokens read so far: one stretch per row, or pages of a shared pool."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moejax.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What cached attention needs. Rows are padded on the left, so all rows write the same slot.

    Attributes:
      k, v: per run of layers, [L, B, G, S, C], or a tuple of L arrays [B, G, S, C] when the
        parameters are split by layer (`transformer.split_layers`), which spares a CPU the copies.
        With `moejax.models.mla` k is [L, B, 1, S, R + P], what keys and values are made of, and v
        has size 0.
      length: int32 scalar, slots in use.
      start_B: int32 [B], the slot of each row's first real token; slot s has position s - start.
      rope_length_B: int32 [B], the length for which "dynamic" rope fixes a row's frequencies.
        They must not change while keys turned by them are kept, so they are fixed per row.
    """

    k: dict[str, jax.Array | tuple[jax.Array, ...]]
    v: dict[str, jax.Array | tuple[jax.Array, ...]]
    length: jax.Array
    start_B: jax.Array
    rope_length_B: jax.Array


def init_cache(
    config: ModelConfig,
    start_B: jax.Array,
    num_slots: int,
    *,
    rope_length_B: jax.Array | None = None,
    dtype: str = "float32",
    split: bool = False,
) -> KVCache:
    """An empty cache of `num_slots` slots a row.

    Args:
      config: the model.
      start_B: int32 [B], how many slots of left padding each row has.
      num_slots: S, prompt and answer together.
      rope_length_B: see `KVCache`; by default the slots a row can fill, S - start.
      dtype: of keys and values.
      split: per-layer arrays, to go with `transformer.split_layers`.
    """
    num_batch = start_B.shape[0]

    def empty(run, num_heads, size):
        shape = (num_batch, num_heads, num_slots, size)
        if split:
            return tuple(jnp.zeros(shape, dtype) for _ in range(run.num_layers))
        return jnp.zeros((run.num_layers, *shape), dtype)

    if rope_length_B is None:
        rope_length_B = num_slots - start_B
    k_shape, v_shape = config.cache_shapes
    return KVCache(
        k={run.name: empty(run, *k_shape) for run in config.runs},
        v={run.name: empty(run, *v_shape) for run in config.runs},
        length=jnp.zeros((), jnp.int32),
        start_B=start_B.astype(jnp.int32),
        rope_length_B=rope_length_B.astype(jnp.int32),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """What cached attention needs where rows come and go: page lists into a pool of A pages.

    Attributes:
      k, v: per run of layers a tuple of arrays, one per layer, [A, G, S, C] with S slots a page
        (`KVCache` says what latent attention keeps there).
      pages_BP: int32, row b's p-th page holds its tokens p S to p S + S - 1. Rows may share pages
        that are full.
      length_B: int32, tokens of each row in the pool.
      valid_B: int32, how many of a call's T tokens are real in each row, the first ones; the others
        are computed and not kept.
      rope_length_B: as in `KVCache`.
    """

    k: dict[str, tuple[jax.Array, ...]]
    v: dict[str, tuple[jax.Array, ...]]
    pages_BP: jax.Array
    length_B: jax.Array
    valid_B: jax.Array
    rope_length_B: jax.Array

    @property
    def page_size(self) -> int:
        """S."""
        return jax.tree.leaves(self.k)[0].shape[-2]

    def positions(self, num_tokens: int) -> jax.Array:
        """int32 [B, T] of a call's tokens."""
        return self.length_B[:, None] + jnp.arange(num_tokens)

    def mask(self, num_tokens: int) -> jax.Array:
        """bool [B, T], true for real tokens."""
        return jnp.arange(num_tokens) < self.valid_B[:, None]

    def places(self, num_tokens: int) -> tuple[jax.Array, jax.Array]:
        """The page and the slot in it where each token is kept, [B, T]; no page for padding."""
        positions_BT = self.positions(num_tokens)
        index_BT = jnp.minimum(positions_BT // self.page_size, self.pages_BP.shape[1] - 1)
        page_BT = jnp.take_along_axis(self.pages_BP, index_BT, axis=1)
        num_pages = jax.tree.leaves(self.k)[0].shape[0]
        page_BT = jnp.where(self.mask(num_tokens), page_BT, num_pages)
        return page_BT, positions_BT % self.page_size


def init_pool(
    config: ModelConfig, num_pages: int, page_size: int, dtype: str = "float32"
) -> tuple[dict[str, tuple[jax.Array, ...]], dict[str, tuple[jax.Array, ...]]]:
    """Empty pages, the k and v of a `PagedCache`."""

    def empty(num_heads: int, size: int):
        shape = (num_pages, num_heads, page_size, size)
        return {
            run.name: tuple(jnp.zeros(shape, dtype) for _ in range(run.num_layers))
            for run in config.runs
        }

    k_shape, v_shape = config.cache_shapes
    return empty(*k_shape), empty(*v_shape)


def extend_split(state, index: int, slot, k: jax.Array, v: jax.Array):
    """Keeps a call's keys and values [B, G, T, C] in a split cache's layer `index`.

    state: the run's (k, v), None without a cache. slot: the first one, or what
    `PagedCache.places` gives. Returns the keys and the values to attend to, and the layer's new
    (k, v).
    """
    if state is None:
        return k, v, None
    if isinstance(slot, tuple):  # pages
        page_BT, slot_BT = slot
        pools = tuple(
            old[index]
            .at[page_BT, :, slot_BT]
            .set(jnp.swapaxes(new, 1, 2).astype(old[index].dtype), mode="drop")
            for old, new in zip(state, (k, v), strict=True)
        )
        return *(pool.astype(k.dtype) for pool in pools), pools
    at = (0, 0, slot, 0)
    both = tuple(
        jax.lax.dynamic_update_slice(old[index], new.astype(old[index].dtype), at)
        for old, new in zip(state, (k, v), strict=True)
    )
    return *(c.astype(k.dtype) for c in both), both
