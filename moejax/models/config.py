"""What a model is, as data: the config that the decoder, importers and planners all read."""

from __future__ import annotations

import dataclasses
from typing import Any

from moejax.core.errors import InputError
from moejax.moe.config import MoEConfig
from moejax.ops.rope import RopeConfig

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class LayerRun:
    """Consecutive layers of one shape, stacked in the tree under ``layers/<name>``."""

    name: str
    num_layers: int
    kind: str  # "dense" or "moe"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model.

    Attributes:
      family: whose config mapping and name table it came with (`moejax.models.families`); the
        decoder never reads it.
      vocab_size: V, rows of the embedding. num_layers: L. d_model: D. d_ff: F, of one expert.
      num_heads: H. num_kv_heads: G, divides H. head_size: C, even.
      norm_eps: of every RMSNorm. rope: positions. max_position: tokens the model is said to read.
      tie_embeddings: the head is the transposed embedding.
      attention_bias, mlp_bias: whether these projections have biases.
      activation: of the gated feed-forward layer.
      moe: None for a dense model, else every layer's feed-forward is a mixture of experts.
      initializer_range: standard deviation of random weights.
    """

    family: str
    vocab_size: int
    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    max_position: int = 2048
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    moe: MoEConfig | None = None
    initializer_range: float = 0.02

    def __post_init__(self):
        sizes = ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_size", "max_position"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"{self.num_heads} heads cannot share {self.num_kv_heads} key-value heads: "
                "num_heads must be a multiple of num_kv_heads"
            )
        if self.head_size % 2:
            raise InputError(f"head_size must be even for rotary positions, got {self.head_size}")
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"activation {self.activation!r} is unknown: use one of {', '.join(ACTIVATIONS)}"
            )

    @property
    def runs(self) -> tuple[LayerRun, ...]:
        """The homogeneous runs of layers, first to last."""
        return (LayerRun("0", self.num_layers, "moe" if self.moe else "dense"),)

    def to_json(self) -> dict[str, Any]:
        """Plain dict for a JSON file. Inverse: `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ModelConfig:
        """Reads `to_json`'s dict; an unknown or missing field is an InputError that names it."""
        fields = dict(fields)
        try:
            if fields.get("moe") is not None:
                fields["moe"] = MoEConfig(**fields["moe"])
            fields["rope"] = RopeConfig(**fields.get("rope", {}))
            return cls(**fields)
        except TypeError as error:
            raise InputError(f"this model config is not of this version: {error}") from error
