"""`moejax.models.describe` for everything that can be loaded, held against the tensors' headers."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable

import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io.hf import config_fields
from moejax.io.load import load_any
from moejax.models.config import ModelConfig
from moejax.models.description import Description, describe_config


def describe(source: str | os.PathLike[str]) -> Description:
    """Describes a folder, GGUF file or hub id; reads config and headers, checks that they fit."""
    loaded = load_any(source, abstract=True)
    counts: Counter[str] = Counter()
    for leaf in tree.flatten(loaded.params).values():
        counts[np.dtype(leaf.dtype).name] += math.prod(leaf.shape)
    return dataclasses.replace(with_exports(loaded.config), stored_dtypes=dict(counts))


def with_exports(config: ModelConfig) -> Description:
    """`describe_config`, and the formats of others that can hold the model."""
    from moejax.io.gguf_write import check_fits  # the gguf package takes a while to import

    found = describe_config(config)
    checks = {"export to hf": config_fields, "export to gguf": check_fits}
    exports = {name: _outcome(check, config) for name, check in checks.items()}
    return dataclasses.replace(found, uses=found.uses | exports)


def _outcome(check: Callable[[ModelConfig], object], config: ModelConfig) -> str:
    try:
        check(config)
    except InputError as error:
        return f"no: {error}"
    return "yes"
