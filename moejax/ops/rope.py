"""Rotary position embeddings (Su et al. 2021) and the ways in which models stretch them."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from moejax.core.errors import InputError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions turn into angles.

    Attributes:
      theta: base of the geometric series of wavelengths.
      kind: "default"; "linear" (positions divided by `factor`); "dynamic" (NTK: theta grows once
        the text is longer than `original_max_position`); "llama3" (long wavelengths stretched,
        short ones kept, a ramp between); "yarn" (the same with a ramp over channels, and queries
        and keys made longer, Peng et al. 2023, arXiv 2309.00071).
      factor: how far the context is stretched.
      low_freq_factor, high_freq_factor: llama3 only, the ends of its ramp.
      original_max_position: tokens the base model was trained on (all but "default", "linear").
      beta_fast, beta_slow: yarn only, the ends of its ramp, in turns over the original length.
      attention_factor: yarn only, by how much queries and keys are longer; None: see `amplitude`.
      mscale, mscale_all_dim: yarn only, DeepSeek's part in `amplitude`; 0: not used.
      truncate: yarn only, whether the ramp begins and ends at whole channels.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"rope scaling {self.kind!r} is unknown: use {', '.join(KINDS)}")
        if not self.theta > 0:
            raise InputError(f"rope theta must be above 0, got {self.theta}")
        if self.kind != "default" and not self.factor >= 1:
            raise InputError(f"rope scaling {self.kind!r} needs factor >= 1, got {self.factor}")
        if self.kind not in ("default", "linear") and self.original_max_position < 1:
            raise InputError(
                f"rope scaling {self.kind!r} needs original_max_position >= 1, "
                f"got {self.original_max_position}"
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise InputError(
                f"rope scaling 'llama3' needs 0 < low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast:
            raise InputError(
                f"rope scaling 'yarn' needs 0 < beta_slow <= beta_fast, got {self.beta_slow} and "
                f"{self.beta_fast}"
            )

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied with; 1 for all kinds but yarn.

        yarn: 0.1 ln(factor) + 1 (arXiv 2309.00071, eq. 22), or DeepSeek's quotient of two such
        numbers, one with mscale and one with mscale_all_dim in front of the logarithm.
        """
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_scale(self.factor, self.mscale) / yarn_scale(
                self.factor, self.mscale_all_dim
            )
        return yarn_scale(self.factor)


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1 for a factor above 1, else 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


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
    if rope.kind == "yarn":
        return _yarn(rope, freqs, head_size)
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


def _yarn(rope: RopeConfig, freqs: jax.Array, head_size: int) -> jax.Array:
    """Channels that turn beta_fast times or more over n0 are kept, up to beta_slow stretched."""

    def channel(turns: float) -> float:
        wavelength = rope.original_max_position / (turns * 2 * math.pi)
        return head_size * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    width = high - low or 0.001  # a ramp without width would divide by zero
    ramp = jnp.clip((jnp.arange(head_size // 2, dtype=jnp.float32) - low) / width, 0, 1)
    return freqs / rope.factor * ramp + freqs * (1 - ramp)


def rotation(
    positions_BT: jax.Array, freqs: jax.Array, amplitude: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, T, C/2], of positions times [C/2] or [B, C/2] frequencies.

    amplitude: what both are multiplied with (`RopeConfig.amplitude`).
    """
    if freqs.ndim == 2:
        freqs = freqs[:, None, :]
    angles = positions_BT[..., None].astype(jnp.float32) * freqs
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if amplitude == 1.0 else (cos * amplitude, sin * amplitude)


def apply_rope(x_BTHC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates channel pairs (i, i + C/2) of every head, the half-split layout of Hugging Face.

    x_BTHC: [B, T, H, C]; cos, sin: [B, T, C/2]. Arithmetic in float32, result in x's dtype.
    """
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHC.dtype)
