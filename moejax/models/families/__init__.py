"""Families as data: presets, the mapping of a Hugging Face config, the Hugging Face name table."""

from __future__ import annotations

from moejax.core.errors import InputError
from moejax.models.families.deepseek_v2 import DEEPSEEK_V2
from moejax.models.families.family import Family, Weight
from moejax.models.families.gemma2 import GEMMA2
from moejax.models.families.gpt_neo import GPT_NEO
from moejax.models.families.llama import LLAMA
from moejax.models.families.mixtral import MIXTRAL
from moejax.models.families.olmoe import OLMOE
from moejax.models.families.opt import OPT
from moejax.models.families.qwen import QWEN2, QWEN3
from moejax.models.families.qwen2_moe import QWEN2_MOE
from moejax.models.families.qwen3_moe import QWEN3_MOE

_DENSE = (LLAMA, QWEN2, QWEN3, GEMMA2, OPT, GPT_NEO)
FAMILIES: tuple[Family, ...] = (*_DENSE, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V2)

__all__ = ["FAMILIES", "Family", "Weight", "by_architecture", "by_name"]


def by_architecture(name: str) -> Family:
    """The family whose Hugging Face class has this name, as in config.json's `architectures`."""
    for family in FAMILIES:
        if family.architecture == name:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise InputError(f"architecture {name!r} is not one that moejax reads: it reads {known}")


def by_name(name: str) -> Family:
    """The family called so in `ModelConfig.family`."""
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise InputError(f"model family {name!r} is unknown: moejax knows {known}")
