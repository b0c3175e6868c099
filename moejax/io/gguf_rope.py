"""Rope scaling in GGUF files: key-value fields, and for "llama3" a tensor of frequency factors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.core.errors import InputError
from moejax.ops.rope import RopeConfig, yarn_scale

# The tensor by which llama.cpp divides the frequencies.
FACTORS = "rope_freqs.weight"
# The numbers behind the factors, as config.json has them: other readers pass over it.
NUMBERS = "moejax.rope_scaling"
# llama.cpp's own, where a file says nothing.
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 was 1e-05 once."""
    return float(str(np.float32(value)))


def rope_fields(rope: RopeConfig, mscales: bool) -> dict[str, Any]:
    """Fields below the architecture's name. Inverse: `scaling_of`.

    mscales: whether the architecture takes DeepSeek's mscale, of which it knows one only.
    """
    if rope.kind not in ("linear", "yarn"):
        return {}
    found: dict[str, Any] = {
        "rope.scaling.type": rope.kind,
        "rope.scaling.factor": float(rope.factor),
    }
    if rope.kind == "yarn":
        found["rope.scaling.original_context_length"] = rope.original_max_position
        for name, unsaid in _BETAS.items():
            if getattr(rope, name) != unsaid:
                found[f"rope.scaling.yarn_{name}"] = float(getattr(rope, name))
        if rope.attention_factor is not None:
            # llama.cpp multiplies its own amplitude by this.
            found["rope.scaling.attn_factor"] = rope.attention_factor / yarn_scale(rope.factor)
        if mscales:
            # By the converter's habit a tenth of it.
            found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope.mscale_all_dim
    return found


def scaling_of(
    stored: Mapping[str, Any], mscales: bool, max_position: int, place: Any
) -> dict[str, Any] | None:
    """config.json's rope_scaling of a file's fields, or None. Inverse: `rope_fields`."""
    kind = stored.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise InputError(
            f"{place}: rope scaling {kind!r} of a GGUF file is not read, only linear and yarn"
        )
    factor = shortest(stored.get("rope.scaling.factor", 1.0))
    found: dict[str, Any] = {"rope_type": kind, "type": kind, "factor": factor}
    if kind == "linear":
        return found
    original = stored.get("rope.scaling.original_context_length", max_position)
    found["original_max_position_embeddings"] = original
    for name, unsaid in _BETAS.items():
        found[name] = shortest(stored.get(f"rope.scaling.yarn_{name}", unsaid))
    stretch = stored.get("rope.scaling.attn_factor", 1.0)
    if shortest(stretch) != 1.0:
        found["attention_factor"] = round(stretch * yarn_scale(factor), 6)
    if mscales:
        tenth = stored.get("rope.scaling.yarn_log_multiplier")
        if tenth is None:
            raise InputError(
                f"{place} has yarn but no rope.scaling.yarn_log_multiplier, which this "
                "architecture needs: it was made by an early converter, make it anew"
            )
        found["mscale"] = found["mscale_all_dim"] = round(10 * shortest(tenth), 6)
    return found


def factors_of(rope: RopeConfig, head_size: int) -> np.ndarray:
    """By what "llama3" divides each frequency, float32 [C/2] (the ramp of `moejax.ops.rope`)."""
    wavelength = 2 * np.pi * rope.theta ** (np.arange(0, head_size, 2) / head_size)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend = np.clip((rope.original_max_position / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / rope.factor + blend)).astype(np.float32)


def llama3_numbers(rope: RopeConfig) -> dict[str, Any]:
    """config.json's rope_scaling of the kind "llama3"."""
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position,
    }


def llama3_of(
    factors: np.ndarray, said: str | None, config: Mapping[str, Any], place: Any
) -> dict[str, Any]:
    """The numbers behind stored factors: those that the file says, else Llama 3.1's and 3.2's.

    InputError where they do not give these factors.
    """
    if said is not None:
        numbers = json.loads(said)
    else:
        factor = max(1.0, float(np.max(factors)))
        numbers = llama3_numbers(RopeConfig(1.0, "llama3", factor, original_max_position=8192))
    size = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    rope = RopeConfig(
        config["rope_theta"],
        "llama3",
        numbers["factor"],
        numbers["low_freq_factor"],
        numbers["high_freq_factor"],
        numbers["original_max_position_embeddings"],
    )
    expected = factors_of(rope, size)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise InputError(f"{place}: {FACTORS} is not Llama 3's rope scaling: nothing else is read")
    return numbers
