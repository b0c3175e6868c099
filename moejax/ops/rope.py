"""Rotary position embeddings (Su et al. 2021) and the ways in which models stretch them."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from moejax.core.errors import InputError

KINDS = ("default", "linear", "dynamic", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions turn into angles.

    Attributes:
      theta: base of the geometric series of wavelengths.
      kind: "default"; "linear" (positions divided by `factor`); "dynamic" (NTK: theta grows once
        the text is longer than `original_max_position`); "llama3" (long wavelengths stretched,
        short ones kept, a ramp between).
      factor: how far the context is stretched.
      low_freq_factor, high_freq_factor: llama3 only, the ends of its ramp.
      original_max_position: tokens the base model was trained on ("dynamic" and "llama3").
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"rope scaling {self.kind!r} is unknown: use {', '.join(KINDS)}")
        if self.kind in ("dynamic", "llama3") and self.original_max_position < 1:
            raise InputError(
                f"rope scaling {self.kind!r} needs original_max_position >= 1, "
                f"got {self.original_max_position}"
            )


def frequencies(rope: RopeConfig, head_size: int, length: jax.Array | int = 0) -> jax.Array:
    """Angle per position of each pair of channels, radians.

    Args:
      rope: the scheme.
      head_size: C, even.
      length: tokens in the text, a number or int [...]; only "dynamic" looks at it, and only
        beyond `original_max_position`.

    Returns:
      float32 [..., C/2], with length's leading dims.
    """
    # float32 exponents and powers, as the reference computes them: bits matter at long positions.
    exponent = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
    if rope.kind == "dynamic":
        return _dynamic(rope, exponent, head_size, jnp.asarray(length))
    freqs = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return freqs / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, freqs)
    return freqs


def _dynamic(rope: RopeConfig, exponent, head_size: int, length) -> jax.Array:
    """NTK: theta' = theta (s n / n0 - (s - 1))^(C / (C - 2)) with n = max(length, n0)."""
    original = rope.original_max_position
    longer = jnp.maximum(length, original).astype(jnp.float32)
    stretch = rope.factor * longer / original - (rope.factor - 1)
    theta = rope.theta * stretch ** (head_size / (head_size - 2))
    return 1.0 / (theta[..., None] ** exponent)


def _llama3(rope: RopeConfig, freqs: jax.Array) -> jax.Array:
    """Llama 3.1: wavelengths above n0/low stretched by `factor`, below n0/high kept, else mixed."""
    original = rope.original_max_position
    wavelength = 2 * math.pi / freqs
    blend = (original / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = (1 - blend) * freqs / rope.factor + blend * freqs
    scaled = jnp.where(wavelength > original / rope.low_freq_factor, freqs / rope.factor, smooth)
    return jnp.where(wavelength < original / rope.high_freq_factor, freqs, scaled)


def rotation(positions_BT: jax.Array, freqs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, T, C/2], of positions times [C/2] or [B, C/2] frequencies."""
    if freqs.ndim == 2:
        freqs = freqs[:, None, :]
    angles = positions_BT[..., None].astype(jnp.float32) * freqs
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTHC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates channel pairs (i, i + C/2) of every head, the half-split layout of Hugging Face.

    x_BTHC: [B, T, H, C]; cos, sin: [B, T, C/2]. Arithmetic in float32, result in x's dtype.
    """
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHC.dtype)
