"""Choosing the next token from logits, each row with its own key."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

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


def sample(logits_BV: jax.Array, keys_B: jax.Array, config: SamplingConfig) -> jax.Array:
    """Draws one token per row: argmax_v (l_v + Gumbel_v) over the tokens that the cuts keep.

    A row's token depends on its own logits and key only, not on its neighbours in the batch.

    Args:
      logits_BV: float [B, V].
      keys_B: typed random keys [B]; unused at temperature 0.
      config: static.

    Returns:
      int32 [B].
    """
    if config.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    filtered_BV = filter_logits(logits_BV, config)
    return jax.vmap(jax.random.categorical)(keys_B, filtered_BV).astype(jnp.int32)


def filter_logits(logits_BV: jax.Array, config: SamplingConfig) -> jax.Array:
    """Logits whose softmax is the distribution drawn from: (l - max l) / temperature, cut to -inf.

    logits_BV: float [B, V]; config.temperature above 0. Returns float32 [B, V].
    """
    assert config.temperature > 0, "greedy decoding has no distribution"
    vocab_size = logits_BV.shape[-1]
    logits_BV = logits_BV.astype(jnp.float32)
    # Subtracting first keeps a tiny temperature from overflowing to inf - inf.
    scaled_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / config.temperature
    if 0 < config.top_k < vocab_size:
        scaled_BV = _keep(scaled_BV, _top_k_mask(scaled_BV, int(config.top_k)))
    if config.top_p < 1:
        probs_BV = jax.nn.softmax(scaled_BV, axis=-1)
        scaled_BV = _keep(scaled_BV, _top_p_mask(probs_BV, config.top_p))
    if config.min_p > 0:
        # The largest scaled logit is 0, so this is p >= min_p * max p without the softmax.
        scaled_BV = _keep(scaled_BV, scaled_BV >= math.log(config.min_p))
    return scaled_BV


def _keep(logits_BV: jax.Array, mask_BV: jax.Array) -> jax.Array:
    return jnp.where(mask_BV, logits_BV, -jnp.inf)


def _top_k_mask(logits_BV: jax.Array, k: int) -> jax.Array:
    """The k largest of each row; of those equal to the k-th, the lowest ids."""
    kth_B1 = jax.lax.top_k(logits_BV, k)[0][:, -1:]
    above_BV = logits_BV > kth_B1
    tied_BV = logits_BV == kth_B1
    room_B1 = k - jnp.sum(above_BV, axis=-1, keepdims=True)
    return above_BV | (tied_BV & (jnp.cumsum(tied_BV, axis=-1) <= room_B1))


def _top_p_mask(probs_BV: jax.Array, top_p: float) -> jax.Array:
    """The fewest most likely tokens whose mass reaches top_p; of equal ones, the lowest ids.

    Finds the smallest kept probability t = max{t: sum_v p_v [p_v >= t] >= top_p} by bisection over
    the bits of a float32 (those of non-negative floats sort as integers do): exact in 31 passes,
    where sorting a vocabulary of 49,152 is fifty times slower on a CPU.
    """
    bits_BV = jax.lax.bitcast_convert_type(probs_BV, jnp.int32)

    def halve(_, bounds):
        low_B1, high_B1 = bounds
        middle_B1 = low_B1 + (high_B1 - low_B1) // 2
        mass_B1 = jnp.sum(jnp.where(bits_BV >= middle_B1, probs_BV, 0), axis=-1, keepdims=True)
        enough_B1 = mass_B1 >= top_p
        return (
            jnp.where(enough_B1, middle_B1, low_B1),
            jnp.where(enough_B1, high_B1, middle_B1),
        )

    low_B1 = jnp.zeros((probs_BV.shape[0], 1), jnp.int32)
    bits_of_one = 127 << 23
    cut_B1, _ = jax.lax.fori_loop(0, 31, halve, (low_B1, low_B1 + (bits_of_one + 1)))
    above_BV = bits_BV > cut_B1
    tied_BV = bits_BV == cut_B1
    cut_prob_B1 = jax.lax.bitcast_convert_type(cut_B1, jnp.float32)
    mass_above_B1 = jnp.sum(jnp.where(above_BV, probs_BV, 0), axis=-1, keepdims=True)
    ties_before_BV = jnp.cumsum(tied_BV, axis=-1) - tied_BV
    return above_BV | (tied_BV & (mass_above_B1 + ties_before_BV * cut_prob_B1 < top_p))
