"""What a model is, as data: the config that the decoder, importers and planners all read."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from moejax.core.errors import InputError
from moejax.models.mla import MLAConfig
from moejax.moe.config import MoEConfig
from moejax.ops.rope import RopeConfig

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
QK_NORMS = ("none", "head", "all")
NORM_KINDS = ("rms", "rms_delta", "layer", "layer_plain")
PLACEMENTS = ("pre", "post", "sandwich")
POSITIONS = ("rope", "learned")


def _check_name(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{what} {value!r} is unknown: use one of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """What may differ between one attention layer and another.

    Attributes:
      windows: layer i sees its last windows[i % len(windows)] tokens, itself included; 0: all.
      scale: factor of the scores; None is head_size^-1/2.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap); None: they do not.
      qk_norm: RMS norm of queries and keys before rope: "none", of each "head", or of "all" heads
        of a token together.
      output_bias: whether the output projection has a bias; None: if the others have.
      clip: queries, keys and values, after their norms, are kept within -clip and clip.
    """

    windows: tuple[int, ...] = (0,)
    scale: float | None = None
    soft_cap: float | None = None
    qk_norm: str = "none"
    output_bias: bool | None = None
    clip: float | None = None

    def __post_init__(self):
        if not self.windows or any(not isinstance(w, int) or w < 0 for w in self.windows):
            raise InputError(f"windows must be numbers of tokens, 0 for all: got {self.windows!r}")
        for name in ("scale", "soft_cap", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"attention {name} must be above 0, got {value!r}")
        _check_name("qk_norm", self.qk_norm, QK_NORMS)


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """Which norms a block has, and where.

    Attributes:
      kind: "rms" (times scale); "rms_delta" (times 1 + delta, Gemma's); "layer" (times scale plus
        bias); "layer_plain" (neither).
      placement: "pre" x + f(norm(x)); "post" norm(x + f(x)); "sandwich" x + norm(f(norm(x))).
      final: whether there is one more after the last layer.
    """

    kind: str = "rms"
    placement: str = "pre"
    final: bool = True

    def __post_init__(self):
        _check_name("norm kind", self.kind, NORM_KINDS)
        _check_name("norm placement", self.placement, PLACEMENTS)


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """How tokens enter and logits leave.

    Attributes:
      positions: "rope", or "learned": a table of max_position + position_offset vectors that are
        added to the tokens', position p in row p + position_offset.
      position_offset: see there.
      scaled: tokens' vectors are multiplied by sqrt(D).
      size: of a token's vector where it is not D: two matrices then lead to D and back.
      logit_soft_cap: logits become cap * tanh(logits / cap); None: they do not.
    """

    positions: str = "rope"
    position_offset: int = 0
    scaled: bool = False
    size: int | None = None
    logit_soft_cap: float | None = None

    def __post_init__(self):
        _check_name("positions", self.positions, POSITIONS)
        if self.position_offset < 0:
            raise InputError(f"position_offset must be 0 or more, got {self.position_offset}")
        if self.size is not None and (not isinstance(self.size, int) or self.size < 1):
            raise InputError(f"embedding size must be 1 or more, got {self.size!r}")
        if self.logit_soft_cap is not None and not self.logit_soft_cap > 0:
            raise InputError(f"logit_soft_cap must be above 0, got {self.logit_soft_cap!r}")


@dataclasses.dataclass(frozen=True)
class LayerRun:
    """Consecutive layers of one shape, stacked in the tree under ``layers/<name>``.

    Their windows may differ: those are numbers that a scan carries along, not shapes.
    """

    name: str
    num_layers: int
    kind: str  # "dense" or "moe"
    windows: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model.

    Attributes:
      family: whose config mapping and name table it came with (`moejax.models.families`); the
        decoder never reads it.
      vocab_size: V, rows of the embedding. num_layers: L. d_model: D. d_ff: F, of a dense layer,
        and of one expert unless `moe.expert_ffn` says otherwise.
      num_heads: H. num_kv_heads: G, divides H. head_size: C, even with rope.
      norm_eps: of every norm. rope: positions. max_position: tokens the model is said to read.
      tie_embeddings: the head is the transposed embedding.
      attention_bias, mlp_bias: whether these projections have biases.
      activation: of the feed-forward layer.
      moe: None for a dense model, else every layer's feed-forward is a mixture of experts.
      initializer_range: standard deviation of random weights.
      gated: whether the feed-forward layer is act(x Wg) * (x Wu), else act(x Wu).
      num_dense_layers: how many layers of an MoE, the first ones, are dense.
      later_dense: indices of layers that are dense after the first one of experts. Each change of
        kind begins a run of its own, compiled apart.
      attention, norms, embedding: what fewer families need.
      mla: attention is DeepSeek-V2's, with these sizes; head_size is `mla.head_size` then.
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
    gated: bool = True
    num_dense_layers: int = 0
    later_dense: tuple[int, ...] = ()
    attention: AttentionConfig = AttentionConfig()
    norms: NormConfig = NormConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    mla: MLAConfig | None = None

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
        if self.mla is not None:
            self._check_mla(self.mla)
        if self.rope_size % 2 and self.embedding.positions == "rope":
            raise InputError(f"head_size must be even for rotary positions, got {self.rope_size}")
        if not isinstance(self.norm_eps, float | int) or not 0 < self.norm_eps < 1:
            raise InputError(f"norm_eps must lie between 0 and 1, got {self.norm_eps!r}")
        _check_name("activation", self.activation, ACTIVATIONS)
        dense = self.num_dense_layers
        if not 0 <= dense <= (self.num_layers - 1 if self.moe else 0):
            raise InputError(
                f"num_dense_layers must leave a layer of experts: got {dense} of {self.num_layers} "
                f"layers{'' if self.moe else ' of a model without experts'}"
            )
        self._check_later_dense()
        if self.moe and not self.gated:
            raise InputError("experts are gated feed-forward layers, and this model's are not")

    def _check_later_dense(self) -> None:
        later = self.later_dense
        inside = all(self.num_dense_layers < i < self.num_layers for i in later)
        if (later and not self.moe) or not inside or list(later) != sorted(set(later)):
            raise InputError(
                f"later_dense must name layers after the first one of experts in order, got "
                f"{list(later)} of {self.num_layers} layers, of which {self.num_dense_layers} are "
                "dense before"
            )

    def _check_mla(self, mla: MLAConfig) -> None:
        needs = {"head_size": mla.head_size, "num_kv_heads": self.num_heads}
        for name, needed in needs.items():
            if getattr(self, name) != needed:
                raise InputError(f"with mla {name} must be {needed}, got {getattr(self, name)}")
        plain = AttentionConfig(self.attention.windows, self.attention.scale)
        if self.attention != plain or self.embedding.positions != "rope":
            raise InputError("mla has rope, and neither soft cap, qk_norm, output_bias nor clip")

    @property
    def rope_size(self) -> int:
        """Channels of a head that rope turns."""
        return self.head_size if self.mla is None else self.mla.rope_size

    @property
    def cache_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, size) of what a cache keeps as keys, and as values, of a token and layer."""
        if self.mla is None:
            return ((self.num_kv_heads, self.head_size),) * 2
        return (1, self.mla.latent_size), (1, 0)

    @property
    def runs(self) -> tuple[LayerRun, ...]:
        """The homogeneous runs of layers, first to last."""
        pattern = self.attention.windows
        found: list[LayerRun] = []
        for kind, layers in itertools.groupby(range(self.num_layers), self._kind):
            windows = tuple(pattern[i % len(pattern)] for i in layers)
            found.append(LayerRun(str(len(found)), len(windows), kind, windows))
        return tuple(found)

    def _kind(self, layer: int) -> str:
        dense = not self.moe or layer < self.num_dense_layers or layer in self.later_dense
        return "dense" if dense else "moe"

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Indices of the layers without experts."""
        return tuple(i for i in range(self.num_layers) if self._kind(i) == "dense")

    @property
    def embed_size(self) -> int:
        """Size of a token's vector in the embedding table."""
        return self.embedding.size or self.d_model

    @property
    def output_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        chosen = self.attention.output_bias
        return self.attention_bias if chosen is None else chosen

    def to_json(self) -> dict[str, Any]:
        """Plain dict for a JSON file. Inverse: `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ModelConfig:
        """Reads `to_json`'s dict; an unknown or missing field is an InputError that names it."""
        fields = dict(fields)
        try:
            for name, kind in (("moe", MoEConfig), ("mla", MLAConfig)):
                if fields.get(name) is not None:
                    fields[name] = kind(**fields[name])
            for name, kind in _PARTS.items():
                part = {key: _tuple(value) for key, value in fields.get(name, {}).items()}
                fields[name] = kind(**part)
            fields["later_dense"] = tuple(fields.get("later_dense", ()))
            return cls(**fields)
        except TypeError as error:
            raise InputError(f"this model config is not of this version: {error}") from error


_PARTS: dict[str, Any] = {
    "rope": RopeConfig,
    "attention": AttentionConfig,
    "norms": NormConfig,
    "embedding": EmbeddingConfig,
}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
