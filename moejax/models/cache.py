"""Keys and values of the tokens read so far."""

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
