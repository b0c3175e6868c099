"""Choosing the next token from logits, each row with its own key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn; the cuts apply in the order of the fields.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token and ignores the rest.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the fewest most likely tokens whose probability, among those kept so far,
        adds up to at least top_p (Holtzman et al. 2020); 1 keeps all.
      min_p: keep tokens at least min_p times as likely as the most likely one (Nguyen et al.
        2024); 0 keeps all.

    Between equally likely tokens every cut keeps the lower id first, so that top_k keeps k tokens
    and not more.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise InputError(f"top_k must be a whole number, 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1 (off), got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be between 0 (off) and 1, got {self.min_p}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """A `SamplingConfig` for every row of a batch, as arrays [B], of numpy or jax."""

    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    min_p_B: Any

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig]) -> SamplingRows:
        """Row i draws as configs[i] says."""
        return cls(
            np.array([c.temperature for c in configs], np.float32),
            np.array([c.top_k for c in configs], np.int32),
            np.array([c.top_p for c in configs], np.float32),
            np.array([c.min_p for c in configs], np.float32),
        )


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, config: SamplingConfig | SamplingRows
) -> jax.Array:
    """Draws one token per row: argmax_v (l_v + Gumbel_v) over the tokens that the cuts keep.

    A row's token depends on its own logits, key and settings only, not on its neighbours in the
    batch.

    Args:
      logits_BV: float [B, V].
      keys_B: typed random keys [B]; unused at temperature 0.
      config: one for all rows, static, or one for each.

    Returns:
      int32 [B].
    """
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if isinstance(config, SamplingConfig):
        if config.temperature == 0:
            return likeliest_B
        config = SamplingRows.of([config] * logits_BV.shape[0])
    rows = config

    def draw():
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, filter_logits(logits_BV, rows))
        return jnp.where(rows.temperature_B > 0, drawn_B.astype(jnp.int32), likeliest_B)

    return jax.lax.cond(jnp.any(rows.temperature_B > 0), draw, lambda: likeliest_B)


def filter_logits(logits_BV: jax.Array, config: SamplingConfig | SamplingRows) -> jax.Array:
    """Logits whose softmax is the distribution drawn from: (l - max l) / temperature, cut to -inf.

    logits_BV: float [B, V]. Returns float32 [B, V]; rows of temperature 0, which have no
    distribution, hold what temperature 1 would give.
    """
    if isinstance(config, SamplingConfig):
        assert config.temperature > 0, "greedy decoding has no distribution"
        config = SamplingRows.of([config] * logits_BV.shape[0])
    top_k_B1, top_p_B1 = config.top_k_B[:, None], config.top_p_B[:, None]
    temperature_B1 = jnp.where(config.temperature_B > 0, config.temperature_B, 1)[:, None]
    logits_BV = logits_BV.astype(jnp.float32)
    # Subtracting first keeps a tiny temperature from overflowing to inf - inf.
    scaled_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature_B1

    def cut_top_k(scaled_BV):
        wanted_B1 = jnp.where(top_k_B1 > 0, top_k_B1, scaled_BV.shape[1])
        # The bits of non-negative floats sort as integers do; likeliest first.
        order_BV = _INFINITE - jax.lax.bitcast_convert_type(jnp.abs(scaled_BV), jnp.int32)
        return _keep(scaled_BV, _fewest(order_BV, jnp.ones_like(scaled_BV), wanted_B1))

    def cut_top_p(scaled_BV):
        probs_BV = jax.nn.softmax(scaled_BV, axis=-1)
        order_BV = jax.lax.bitcast_convert_type(probs_BV, jnp.int32)
        return _keep(scaled_BV, (top_p_B1 >= 1) | _fewest(order_BV, probs_BV, top_p_B1))

    def unchanged(scaled_BV):
        return scaled_BV

    scaled_BV = jax.lax.cond(jnp.any(top_k_B1 > 0), cut_top_k, unchanged, scaled_BV)
    scaled_BV = jax.lax.cond(jnp.any(top_p_B1 < 1), cut_top_p, unchanged, scaled_BV)
    # The largest scaled logit is 0, so this is p >= min_p * max p without the softmax.
    return _keep(scaled_BV, scaled_BV >= jnp.log(config.min_p_B)[:, None])


_INFINITE = 255 << 23  # bits of a float32's infinity


def _keep(logits_BV: jax.Array, mask_BV: jax.Array) -> jax.Array:
    return jnp.where(mask_BV, logits_BV, -jnp.inf)


def _fewest(order_BV: jax.Array, weight_BV: jax.Array, wanted_B1: jax.Array) -> jax.Array:
    """The fewest tokens of highest order whose weights add up to `wanted`; of equals the lowest id.

    Finds the smallest kept order t = max{t: sum_v w_v [o_v >= t] >= wanted} by bisection over the
    31 bits of a non-negative int32: exact in 31 passes, where sorting a vocabulary of 49,152 is
    fifty times slower on a CPU. Keeps all where no t reaches it.
    """

    def halve(_, bounds):
        low_B1, high_B1 = bounds
        middle_B1 = low_B1 + (high_B1 - low_B1) // 2
        mass_B1 = jnp.sum(jnp.where(order_BV >= middle_B1, weight_BV, 0), axis=-1, keepdims=True)
        enough_B1 = mass_B1 >= wanted_B1
        return (
            jnp.where(enough_B1, middle_B1, low_B1),
            jnp.where(enough_B1, high_B1, middle_B1),
        )

    low_B1 = jnp.zeros((order_BV.shape[0], 1), jnp.int32)
    cut_B1, _ = jax.lax.fori_loop(0, 31, halve, (low_B1, low_B1 + (_INFINITE + 1)))
    above_BV = order_BV > cut_B1
    tied_BV = order_BV == cut_B1
    mass_above_B1 = jnp.sum(jnp.where(above_BV, weight_BV, 0), axis=-1, keepdims=True)
    weight_B1 = jnp.max(jnp.where(tied_BV, weight_BV, 0), axis=-1, keepdims=True)
    ties_before_BV = jnp.cumsum(tied_BV, axis=-1) - tied_BV
    return above_BV | (tied_BV & (mass_above_B1 + ties_before_BV * weight_B1 < wanted_B1))
