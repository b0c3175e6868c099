"""A model in hand, with all that a folder on disk says about it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moejax.core import tree
from moejax.io.safetensors import TensorSource
from moejax.io.tokenizer import Tokenizer
from moejax.models.config import ModelConfig


class License(NamedTuple):
    """Licence of the weights: its SPDX-like name ("apache-2.0") and its text, where known."""

    name: str | None = None
    text: str | None = None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and what came with it.

    Attributes:
      params: nested dict of arrays, as `moejax.models.transformer.abstract_params` lays it out.
      config: the model.
      tokenizer: None where the source had none.
      generation: the fields of generation_config.json (special token ids, sampling defaults).
      lineage: the operations that made it, first to last.
      source: where it was read from.
      license: carried into every folder that is written from it.
      tensors: of a model whose parameters were left on disk (`params` is abstract), in Hugging
        Face's layout: it can be written elsewhere part by part. None for one in memory.
      prompt_forms: task to prompt form, how it wants to be asked (`moejax.io.prompt_forms`).
    """

    params: Any
    config: ModelConfig
    tokenizer: Tokenizer | None = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    lineage: tuple[dict[str, Any], ...] = ()
    source: str = ""
    license: License = License()
    tensors: TensorSource | None = None
    prompt_forms: dict[str, str] = dataclasses.field(default_factory=dict)


# Called with (bytes done, bytes in all) after every tensor.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a model is read.

    Attributes:
      dtype: of the parameters; "keep" leaves each as it is stored (quantised ones are float32).
      abstract: check everything but read no weight: the parameters are `jax.ShapeDtypeStruct`.
      progress: told after every tensor.
    """

    dtype: str = "keep"
    abstract: bool = False
    progress: Progress | None = None


def main_dtype(params: Any) -> np.dtype:
    """The dtype that most parameters have."""
    sizes: Counter[np.dtype] = Counter()
    for leaf in tree.flatten(params).values():
        sizes[np.dtype(leaf.dtype)] += int(np.prod(leaf.shape))
    return sizes.most_common(1)[0][0]
