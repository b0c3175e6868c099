"""What a model is and costs, and what can be done with it, from its config alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from moejax.core.errors import InputError
from moejax.models import flops
from moejax.models.config import ModelConfig
from moejax.models.families import by_architecture


@dataclasses.dataclass(frozen=True)
class Description:
    """A model in numbers.

    Attributes:
      family: as in `ModelConfig.family`.
      num_params, active_params: all parameters, and those that one token uses.
      flops_per_token: of a forward pass over a text of `seq_len` tokens.
      seq_len: the length that is meant there.
      kv_cache_bytes_per_token: of all layers, with a cache of 2-byte numbers.
      options: the fields of the config that are not `ModelConfig`'s defaults, and of its parts
        those that are not the part's.
      uses: what moejax can do with the model -> "yes", maybe with a condition, or "no: why".
      stored_dtypes: dtype -> how many parameters are read as it with dtype="keep" (quantised ones
        are float32 there); empty where only the config was read.
    """

    family: str
    num_params: int
    active_params: int
    flops_per_token: float
    seq_len: int
    kv_cache_bytes_per_token: int
    options: dict[str, Any]
    uses: dict[str, str]
    stored_dtypes: dict[str, int] = dataclasses.field(default_factory=dict)


def describe_config(config: ModelConfig, seq_len: int | None = None) -> Description:
    """Describes a model; seq_len is by default what it reads, at most 4096."""
    seq_len = seq_len or min(config.max_position, 4096)
    cached = sum(heads * size for heads, size in config.cache_shapes)
    return Description(
        family=config.family,
        num_params=flops.num_params(config),
        active_params=flops.active_params(config),
        flops_per_token=flops.forward_flops_per_token(config, seq_len),
        seq_len=seq_len,
        kv_cache_bytes_per_token=2 * cached * config.num_layers,
        options=_options(config),
        uses=_uses(config),
    )


def describe(folder: str | Path) -> Description:
    """Describes the model of a Hugging Face folder by its config.json; reads no weights.

    `moejax.io.describe` also reads GGUF files and our own folders, and checks the tensors' headers.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{path} is missing: name a Hugging Face folder")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}; fetch the file again") from None
    names = fields.get("architectures") if isinstance(fields, dict) else None
    if not isinstance(names, list) or len(names) != 1:
        raise InputError(f"{path} must name one architecture, it names {names!r}")
    return describe_config(by_architecture(names[0]).config_from_hf(fields))


def _options(config: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        needed = field.default is dataclasses.MISSING and not isinstance(config, ModelConfig)
        if needed or field.default not in (dataclasses.MISSING, value):
            found[field.name] = _options(value) if _is_part(value) else value
    return found


def _is_part(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _uses(config: ModelConfig) -> dict[str, str]:
    dense = "yes" if config.moe is None else "no: it has experts already"
    if config.moe is None and not config.gated:
        dense = "no: its feed-forward layers are not gated"
    return {
        "upcycle": dense,
        "esft": "no: it has no experts: upcycle it first" if config.moe is None else "yes",
        "merge": _merge_use(config),
        "interpolate": _INTERPOLATE,
    }


_INTERPOLATE = "yes, with a checkpoint of the same run"


def _merge_use(config: ModelConfig) -> str:
    """What `moejax.methods.merge` asks of a config."""
    moe = config.moe
    if moe is None:
        return "no: it has no experts"
    if config.dense_layers:
        return f"no: {len(config.dense_layers)} of its layers are dense already"
    if moe.expert_ffn not in (None, config.d_ff) or moe.shared_ffn:
        return f"no: its experts or shared network have not the dense layer's width {config.d_ff}"
    return "yes" if moe.num_shared else "yes, but no learned lambda: it has no shared expert"
