"""config.json's fields that several families share, both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.ops.rope import RopeConfig

REQUIRED = (
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
)
HF_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_KINDS = {"full_attention": False, "sliding_attention": True}


def require(fields: Mapping[str, Any], names: Sequence[str], family: str) -> None:
    """InputError that names those of `names` that config.json lacks."""
    missing = [name for name in names if fields.get(name) is None]
    if missing:
        lacking = ", ".join(missing)
        raise InputError(f"config.json lacks {lacking}: a {family} config must have them")


def flag(fields: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A field that is true or false, or null or absent, which is `default`."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InputError(f"config.json: {name} must be true or false, got {value!r}")
    return value


def activation_from_hf(fields: Mapping[str, Any], name: str) -> str:
    """Our name of the activation in this field."""
    found = fields[name]
    if found not in HF_ACTIVATIONS:
        raise InputError(f"config.json: {name} {found!r} is not one that moejax knows")
    return HF_ACTIVATIONS[found]


def activation_to_hf(activation: str, prefer: str | None = None) -> str:
    """Hugging Face's name of an activation: `prefer`, if that is one of its names, or the first."""
    names = [theirs for theirs, ours in HF_ACTIVATIONS.items() if ours == activation]
    return prefer if prefer in names else names[0]


def head_size_from_hf(fields: Mapping[str, Any]) -> int:
    """head_dim, or hidden_size / num_attention_heads where there is none."""
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    if fields.get("head_dim") is not None:
        return fields["head_dim"]
    if width % heads:
        raise InputError(
            f"config.json: hidden_size {width} is not a multiple of num_attention_heads "
            f"{heads}, and there is no head_dim"
        )
    return width // heads


def llama_like(
    family: str, fields: Mapping[str, Any], activation: str = "hidden_act"
) -> dict[str, Any]:
    """`ModelConfig`'s arguments that families of Llama's shape read from the same fields.

    fields: config.json over the family's defaults.  activation: the field that names it.
    """
    require(fields, REQUIRED, family)
    heads = fields["num_attention_heads"]
    groups = fields.get("num_key_value_heads")
    max_position = fields.get("max_position_embeddings", 2048)
    return {
        "family": family,
        "vocab_size": fields["vocab_size"],
        "num_layers": fields["num_hidden_layers"],
        "d_model": fields["hidden_size"],
        "d_ff": fields["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": heads if groups is None else groups,
        "head_size": head_size_from_hf(fields),
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "rope": rope_from_hf(fields, max_position),
        "max_position": max_position,
        "tie_embeddings": flag(fields, "tie_word_embeddings"),
        "activation": activation_from_hf({activation: "silu"} | dict(fields), activation),
        "initializer_range": fields.get("initializer_range", 0.02),
    }


def llama_like_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields that `llama_like` reads, and those that say nothing but must be there."""
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": activation_to_hf(config.activation),
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "use_cache": True,
        **rope_to_hf(config.rope),
    }


def rope_from_hf(fields: Mapping[str, Any], max_position: int) -> RopeConfig:
    """Reads either spelling of the rope fields; DeepSeek-Coder's "linear" is one of the kinds."""
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", fields.get("rope_theta"))
    theta = 10000.0 if theta is None else float(theta)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    partial = scaling.get("partial_rotary_factor", fields.get("partial_rotary_factor")) or 1.0
    if partial != 1.0:
        raise InputError(f"config.json: partial_rotary_factor {partial} is not read, only 1")
    if kind == "default":
        return RopeConfig(theta)
    try:
        numbers: dict[str, Any] = {"factor": float(scaling["factor"])}
        if kind == "dynamic":
            # transformers measures "dynamic" against max_position_embeddings.
            numbers["original_max_position"] = max_position
        if kind == "llama3":
            numbers["low_freq_factor"] = float(scaling["low_freq_factor"])
            numbers["high_freq_factor"] = float(scaling["high_freq_factor"])
            numbers["original_max_position"] = int(scaling["original_max_position_embeddings"])
        if kind == "yarn":
            numbers |= _yarn_from_hf(scaling, max_position)
    except KeyError as error:
        raise InputError(f"config.json: rope scaling {kind!r} lacks its field {error}") from error
    return RopeConfig(theta, kind, **numbers)


def _yarn_from_hf(scaling: Mapping[str, Any], max_position: int) -> dict[str, Any]:
    return {
        "original_max_position": int(
            scaling.get("original_max_position_embeddings") or max_position
        ),
        "beta_fast": float(scaling.get("beta_fast") or 32),
        "beta_slow": float(scaling.get("beta_slow") or 1),
        "attention_factor": scaling.get("attention_factor"),
        "mscale": float(scaling.get("mscale") or 0),
        "mscale_all_dim": float(scaling.get("mscale_all_dim") or 0),
        "truncate": bool(scaling.get("truncate", True)),
    }


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """config.json's rope fields, in transformers 4's spelling, which transformers 5 reads too."""
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.kind, "type": rope.kind, "factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_position
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(rope, name):
                scaling[name] = getattr(rope, name)
        if not rope.truncate:
            scaling["truncate"] = False
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def windows_from_hf(fields: Mapping[str, Any], default: Sequence[str]) -> tuple[int, ...]:
    """Windows per layer, as short a pattern as says the same, of layer_types or `default`.

    default: what layer_types would be ("full_attention" or "sliding_attention" each).
    """
    num_layers, window = fields["num_hidden_layers"], fields.get("sliding_window") or 0
    kinds = fields.get("layer_types") or default
    if len(kinds) != num_layers:
        raise InputError(
            f"config.json: layer_types names {len(kinds)} layers, num_hidden_layers is {num_layers}"
        )
    unknown = sorted(set(kinds) - _KINDS.keys())
    if unknown:
        raise InputError(f"config.json: layer type {unknown[0]!r} is not one that moejax knows")
    if any(_KINDS[kind] for kind in kinds) and not window:
        raise InputError(
            "config.json: layer_types has sliding_attention layers, but sliding_window is "
            f"{fields.get('sliding_window')}"
        )
    return shortest_pattern(tuple(window if _KINDS[kind] else 0 for kind in kinds))


def shortest_pattern(values: tuple[int, ...]) -> tuple[int, ...]:
    """The shortest tuple that, repeated, begins with `values`."""
    for size in range(1, len(values)):
        if all(value == values[i % size] for i, value in enumerate(values)):
            return values[:size]
    return values


def windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    """layer_types and sliding_window. Inverse: `windows_from_hf`."""
    windows = [window for run in config.runs for window in run.windows]
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"layer_types": kinds, "sliding_window": max(windows) or None}
