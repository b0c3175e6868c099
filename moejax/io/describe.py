"""`moejax.models.describe` for everything that can be loaded, held against the tensors' headers."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter

import numpy as np

from moejax.core import tree
from moejax.io.load import load_any
from moejax.models.description import Description, describe_config


def describe(source: str | os.PathLike[str]) -> Description:
    """Describes a folder, GGUF file or hub id; reads config and headers, checks that they fit."""
    loaded = load_any(source, abstract=True)
    counts: Counter[str] = Counter()
    for leaf in tree.flatten(loaded.params).values():
        counts[np.dtype(leaf.dtype).name] += math.prod(leaf.shape)
    return dataclasses.replace(describe_config(loaded.config), stored_dtypes=dict(counts))
