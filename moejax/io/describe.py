"""`moejax.models.describe` for everything that can be loaded, held against the tensors' headers."""

from __future__ import annotations

import os

from moejax.io.load import load_any
from moejax.models.description import Description, describe_config


def describe(source: str | os.PathLike[str]) -> Description:
    """Describes a folder, GGUF file or hub id; reads config and headers, checks that they fit."""
    return describe_config(load_any(source, abstract=True).config)
