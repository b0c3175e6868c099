"""What a family of models is made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from moejax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """One Hugging Face tensor and its place in the tree.

    Attributes:
      path: of the leaf in our tree.
      layer: index into the leaf's leading dim, None for a leaf that is not stacked.
      expert: index into the next one, of a leaf with a stack of experts in every layer.
      hf_name: the tensor's name.
      shape: of our leaf, without the leading dims of layers and experts.
      in_dims: how many of our leading dims are inputs of a linear map. Torch stores a linear map
        as [out, in], ours is [in..., out...]; 0 means the tensor is stored as it is.
    """

    path: str
    layer: int | None
    hf_name: str
    shape: tuple[int, ...]
    in_dims: int
    expert: int | None = None

    @property
    def index(self) -> tuple[int, ...]:
        """Where the tensor lies in its leaf; () is the whole leaf."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor."""
        if not self.in_dims:
            return self.shape if self.path.startswith("embed/") else (math.prod(self.shape),)
        inputs, outputs = self.shape[: self.in_dims], self.shape[self.in_dims :]
        return (math.prod(outputs), math.prod(inputs))

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        """Torch's layout to ours. Inverse: `to_hf`."""
        return (array.T if self.in_dims else array).reshape(self.shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Our layout to torch's. Inverse: `from_hf`."""
        rows, columns = self.hf_shape if self.in_dims else (0, 0)
        return array.reshape(columns, rows).T if self.in_dims else array.reshape(self.hf_shape)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models, as data.

    Attributes:
      name: as in `ModelConfig.family`.
      architecture: the Hugging Face class; model_type: the same in config.json.
      config_from_hf, config_to_hf: the two directions of config.json's fields.
      name_table: every Hugging Face tensor of a config with its place in our tree.
      presets: named configs.
      computed: a pattern of the tensors that old checkpoints store and every reader computes.
    """

    name: str
    architecture: str
    model_type: str
    config_from_hf: Callable[[dict[str, Any]], ModelConfig]
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    name_table: Callable[[ModelConfig], list[Weight]]
    presets: dict[str, ModelConfig]
    computed: str = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
