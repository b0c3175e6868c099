"""Which experts a task trains: the record that ESFT's stages hand to one another.

On disk it is the reference's file (github.com/deepseek-ai/ESFT, `expert_configs/<task>.json` and an
adapter's `expert_cfg.json`):

    {"experts": {"<layer>": [expert, ...]}, "shared_experts": bool, "non_expert_modules": bool}
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax.core.errors import InputError
from moejax.io import atomic
from moejax.models.config import ModelConfig

ADAPTER_FILE = "expert_cfg.json"


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """The trained part of a model.

    Attributes:
      experts: layer (counted over the whole model, dense layers too) -> ids of routed experts in
        the layer's own numbering, most relevant first. The order carries meaning for readers only.
      shared_experts: whether the experts that every token uses are trained.
      non_expert_modules: whether everything that is no expert is trained, the router included.
    """

    experts: Mapping[int, tuple[int, ...]]
    shared_experts: bool = False
    non_expert_modules: bool = False

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Every (layer, expert), ascending."""
        return tuple(sorted((layer, e) for layer, ids in self.experts.items() for e in ids))

    def to_json(self) -> dict[str, Any]:
        """The reference's schema. Inverse: `from_json`."""
        return {
            "experts": {str(layer): list(ids) for layer, ids in self.experts.items()},
            "shared_experts": self.shared_experts,
            "non_expert_modules": self.non_expert_modules,
        }

    @classmethod
    def from_json(cls, fields: Any, where: str) -> ExpertConfig:
        """Reads the reference's schema; InputError for anything else, an expert named twice too."""
        if not isinstance(fields, Mapping) or not isinstance(fields.get("experts"), Mapping):
            raise InputError(f'{where} has no "experts" by layer: it is no expert config')
        experts = {}
        for layer, ids in fields["experts"].items():
            experts[_number(layer, f"{where}: layer")] = _ids(ids, f"{where}: layer {layer}")
        flags = {}
        for name in ("shared_experts", "non_expert_modules"):
            flags[name] = fields.get(name, False)
            if not isinstance(flags[name], bool):
                raise InputError(f"{where}: {name} is {flags[name]!r}, not true or false")
        return cls(experts, **flags)

    def check_fits(self, config: ModelConfig, where: str) -> None:
        """Raises InputError unless every layer and expert is one of the model's routed ones."""
        if config.moe is None:
            raise InputError(f"{where} names experts, but the model is dense: upcycle it first")
        layers = moe_layers(config)
        low, high = config.moe.num_shared, config.moe.num_experts - 1
        for layer, ids in self.experts.items():
            if layer not in layers:
                raise InputError(
                    f"{where} names layer {layer}, but the model's {len(layers)} layers of experts "
                    f"lie between {layers[0]} and {layers[-1]}: it is of another model"
                )
            wrong = [e for e in ids if not low <= e <= high]
            if wrong:
                raise InputError(
                    f"{where} names expert {wrong[0]} in layer {layer}, but the model's routed "
                    f"experts are {low} to {high}: it is of another model"
                )


def moe_layers(config: ModelConfig) -> tuple[int, ...]:
    """Numbers of the layers with experts, counted over the whole model."""
    return tuple(i for i in range(config.num_layers) if i not in config.dense_layers)


def read(path: str | os.PathLike[str]) -> ExpertConfig:
    """Reads an expert config: the file, or an adapter's folder. InputError says what is wrong."""
    path = Path(path)
    path = path / ADAPTER_FILE if path.is_dir() else path
    return ExpertConfig.from_json(atomic.read_json(path), str(path))


def write(path: str | os.PathLike[str], config: ExpertConfig) -> None:
    """Writes the reference's file, byte for byte as its own script does. Inverse: `read`."""
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(config.to_json()))


def _number(text: Any, where: str) -> int:
    if not str(text).isdecimal():
        raise InputError(f"{where} {text!r} is not a number of 0 or more")
    return int(text)


def _ids(ids: Any, where: str) -> tuple[int, ...]:
    if not isinstance(ids, list) or any(type(e) is not int or e < 0 for e in ids):
        raise InputError(f"{where} is {ids!r}, not a list of expert numbers")
    twice = [e for i, e in enumerate(ids) if e in ids[:i]]
    if twice:
        raise InputError(f"{where} names expert {twice[0]} twice: name it once")
    return tuple(ids)
