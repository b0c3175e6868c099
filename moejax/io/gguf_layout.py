"""What llama.cpp calls the fields and tensors of each family: data, read in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from moejax.core.errors import InputError
from moejax.io import gguf_deepseek2
from moejax.models.config import ModelConfig
from moejax.models.families import Weight


class Field(NamedTuple):
    """One field of a config: its key below the architecture's name, and config.json's name."""

    key: str
    hf: str
    kind: type = int
    required: bool = True


class Limit(NamedTuple):
    """What llama.cpp cannot load of an architecture, though a file could hold it."""

    words: str
    applies: Callable[[ModelConfig], bool]


_NO_BIASES = Limit("biases of attention", lambda config: config.attention_bias)
_ALWAYS_TIED = Limit("an output matrix of its own", lambda config: not config.tie_embeddings)
_NEVER_TIED = Limit("the embedding as output matrix", lambda config: config.tie_embeddings)
_ALL_KEYS = Limit("key-value heads for several heads", lambda c: c.num_kv_heads != c.num_heads)
_SHARED = Limit("no shared experts", lambda c: c.moe is not None and not c.moe.shared_ffn)
# DeepSeek-V2-Lite, whose queries have no rank, is known by its layers.
_LITE = Limit(
    "no q_lora_rank and other than 26 or 27 layers",
    lambda c: c.mla is not None and c.mla.q_rank is None and c.num_layers not in (26, 27),
)

# Path of a leaf, below layers/<run>/ where it lies there -> name of the tensor.
NAMES = {
    "embed/tokens": "token_embd.weight",
    "final_norm/scale": "output_norm.weight",
    "final_norm/delta": "output_norm.weight",
    "lm_head/w": "output.weight",
    "attn_norm/scale": "blk.{i}.attn_norm.weight",
    "attn_norm/delta": "blk.{i}.attn_norm.weight",
    "attn/w_q": "blk.{i}.attn_q.weight",
    "attn/w_k": "blk.{i}.attn_k.weight",
    "attn/w_v": "blk.{i}.attn_v.weight",
    "attn/w_o": "blk.{i}.attn_output.weight",
    "attn/b_q": "blk.{i}.attn_q.bias",
    "attn/b_k": "blk.{i}.attn_k.bias",
    "attn/b_v": "blk.{i}.attn_v.bias",
    "attn/b_o": "blk.{i}.attn_output.bias",
    "attn/w_q_down": "blk.{i}.attn_q_a.weight",
    "attn/w_q_up": "blk.{i}.attn_q_b.weight",
    "attn/w_kv_down": "blk.{i}.attn_kv_a_mqa.weight",
    "attn/kv_norm/scale": "blk.{i}.attn_kv_a_norm.weight",
    "attn/q_norm/scale": "blk.{i}.attn_q_norm.weight",
    "attn/k_norm/scale": "blk.{i}.attn_k_norm.weight",
    "attn_post_norm/delta": "blk.{i}.post_attention_norm.weight",
    "mlp_norm/scale": "blk.{i}.ffn_norm.weight",
    "mlp_norm/delta": "blk.{i}.ffn_norm.weight",
    "mlp_post_norm/delta": "blk.{i}.post_ffw_norm.weight",
    "mlp/w_gate": "blk.{i}.ffn_gate.weight",
    "mlp/w_up": "blk.{i}.ffn_up.weight",
    "mlp/w_down": "blk.{i}.ffn_down.weight",
    "mlp/b_gate": "blk.{i}.ffn_gate.bias",
    "mlp/b_up": "blk.{i}.ffn_up.bias",
    "mlp/b_down": "blk.{i}.ffn_down.bias",
    "moe/router/w_out": "blk.{i}.ffn_gate_inp.weight",
    "moe/experts/w_gate": "blk.{i}.ffn_gate_exps.weight",
    "moe/experts/w_up": "blk.{i}.ffn_up_exps.weight",
    "moe/experts/w_down": "blk.{i}.ffn_down_exps.weight",
    "moe/shared/w_gate": "blk.{i}.ffn_gate_shexp.weight",
    "moe/shared/w_up": "blk.{i}.ffn_up_shexp.weight",
    "moe/shared/w_down": "blk.{i}.ffn_down_shexp.weight",
    "moe/shared/w_mix": "blk.{i}.ffn_gate_inp_shexp.weight",
}
FIELDS = (
    Field("block_count", "num_hidden_layers"),
    Field("embedding_length", "hidden_size"),
    Field("feed_forward_length", "intermediate_size"),
    Field("attention.head_count", "num_attention_heads"),
    Field("attention.head_count_kv", "num_key_value_heads", required=False),
    Field("context_length", "max_position_embeddings"),
    Field("attention.layer_norm_rms_epsilon", "rms_norm_eps", float),
    Field("rope.freq_base", "rope_theta", float, False),
    Field("vocab_size", "vocab_size", required=False),
)
# The first that a file has counts; all are written.
_HEAD_SIZE = (
    Field("attention.key_length", "head_dim", required=False),
    Field("attention.value_length", "head_dim", required=False),
    Field("rope.dimension_count", "head_dim", required=False),
)
_ROUTED = (
    Field("expert_count", "num_experts"),
    Field("expert_used_count", "num_experts_per_tok"),
)
_WIDTH = Field("expert_feed_forward_length", "moe_intermediate_size")


@dataclasses.dataclass(frozen=True)
class GgufLayout:
    """A family in GGUF.

    Attributes:
      family: as in `ModelConfig.family`. architecture: llama.cpp's name, which families may share.
      experts: whether files with experts are this family, or those without.
      fields: beside `FIELDS`.
      implied: what llama.cpp takes for granted of a config, given the fields that are stored.
      paired: leaves whose rows lie as llama.cpp's rope wants them: it turns neighbouring channels
        together where Hugging Face turns the two halves of a head.
      head_size: the fields that say it.
      names: in place of `NAMES`.
      fields_in, fields_out: what neither list can say, of the stored fields (below the
        architecture's name; and the file, for errors) and of config.json's.
      factors: whether llama.cpp takes a tensor of frequency factors.
      mscales: see `moejax.io.gguf_rope.rope_fields`.
      limits: what llama.cpp cannot load (found by having it load such files).

    Norms that multiply by 1 + w (leaves called delta) are stored with the 1 added.
    """

    family: str
    architecture: str
    experts: bool = False
    fields: tuple[Field, ...] = ()
    implied: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda fields: {}
    paired: tuple[str, ...] = ()
    head_size: tuple[Field, ...] = _HEAD_SIZE
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields_in: Callable[[Mapping[str, Any], Any], Mapping[str, Any]] = lambda stored, place: {}
    fields_out: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda fields: {}
    factors: bool = False
    mscales: bool = False
    limits: tuple[Limit, ...] = ()

    @property
    def all_fields(self) -> tuple[Field, ...]:
        """Every field, those of the heads' size last."""
        return (*FIELDS, *self.fields, *self.head_size)


def _gemma2(fields: dict[str, Any]) -> dict[str, Any]:
    # llama.cpp knows the 27B model, whose queries are scaled by another size, by its layers.
    of_heads = fields["hidden_size"] // fields["num_attention_heads"]
    is_27b = fields["num_hidden_layers"] == 46
    return {"query_pre_attn_scalar": of_heads if is_27b else fields["head_dim"] or of_heads}


_PAIRED = ("attn/w_q", "attn/w_k", "attn/b_q", "attn/b_k")
LAYOUTS = (
    GgufLayout("llama", "llama", paired=_PAIRED, factors=True),
    GgufLayout(
        "mixtral",
        "llama",
        True,
        (Field("expert_count", "num_local_experts"), _ROUTED[1]),
        paired=_PAIRED,
        factors=True,
    ),
    GgufLayout("qwen2", "qwen2"),
    GgufLayout("qwen3", "qwen3", limits=(_NO_BIASES,)),
    GgufLayout(
        "gemma2",
        "gemma2",
        fields=(
            Field("attn_logit_softcapping", "attn_logit_softcapping", float, False),
            Field("final_logit_softcapping", "final_logit_softcapping", float, False),
            Field("attention.sliding_window", "sliding_window", required=False),
        ),
        implied=_gemma2,
        limits=(_NO_BIASES, _ALWAYS_TIED),
    ),
    GgufLayout("olmoe", "olmoe", True, _ROUTED, limits=(_NO_BIASES, _NEVER_TIED, _ALL_KEYS)),
    GgufLayout(
        "qwen2_moe",
        "qwen2moe",
        True,
        (
            *_ROUTED,
            _WIDTH,
            Field("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        ),
        limits=(_NEVER_TIED,),
    ),
    GgufLayout(
        *("qwen3_moe", "qwen3moe", True, (*_ROUTED, _WIDTH)),
        implied=lambda fields: {"norm_topk_prob": True},
        limits=(_NO_BIASES,),
    ),
    GgufLayout(
        "deepseek_v2",
        "deepseek2",
        True,
        (
            Field("expert_count", "n_routed_experts"),
            _ROUTED[1],
            _WIDTH,
            Field("expert_shared_count", "n_shared_experts"),
            Field("expert_weights_scale", "routed_scaling_factor", float, False),
            Field("expert_weights_norm", "norm_topk_prob", bool, False),
            Field("expert_group_count", "n_group", required=False),
            Field("expert_group_used_count", "topk_group", required=False),
            Field("leading_dense_block_count", "first_k_dense_replace"),
            Field("attention.q_lora_rank", "q_lora_rank", required=False),
            Field("attention.kv_lora_rank", "kv_lora_rank"),
            Field("rope.dimension_count", "qk_rope_head_dim"),
        ),
        head_size=(),
        names={"attn/q_norm/scale": "blk.{i}.attn_q_a_norm.weight"},
        fields_in=gguf_deepseek2.fields_in,
        fields_out=gguf_deepseek2.fields_out,
        mscales=True,
        limits=(_NO_BIASES, _SHARED, _LITE),
    ),
)


def layout_of(config: ModelConfig) -> GgufLayout:
    """The layout to write a model in; InputError where llama.cpp would not load it."""
    for layout in LAYOUTS:
        if layout.family == config.family and layout.experts == (config.moe is not None):
            for limit in layout.limits:
                if limit.applies(config):
                    raise InputError(
                        f"llama.cpp loads no {layout.architecture} file with {limit.words}: "
                        "use --format=hf"
                    )
            return layout
    kind = " with experts of this kind" if config.moe else ""
    known = ", ".join(layout.family for layout in LAYOUTS)
    raise InputError(f"family {config.family}{kind} has no GGUF layout here: there are {known}")


def layout_of_file(metadata: Mapping[str, Any], place: Any) -> GgufLayout:
    """The layout that a file's architecture, and whether it has experts, ask for."""
    name = metadata.get("general.architecture")
    experts = bool(metadata.get(f"{name}.expert_count"))
    for layout in LAYOUTS:
        if layout.architecture == name and layout.experts == experts:
            return layout
    kind = " with experts" if experts else ""
    known = ", ".join(dict.fromkeys(layout.architecture for layout in LAYOUTS))
    raise InputError(f"{place} has GGUF architecture {name!r}{kind}: moejax reads {known}")


class Cut(NamedTuple):
    """The rows first to last of each head, which has `size` of them, as a stack of matrices.

    transposed: each head's matrix is.
    """

    first: int
    last: int
    size: int
    transposed: bool


class Place(NamedTuple):
    """Where a Hugging Face tensor, or the part of it in `cut`, lies in a file, and how.

    Attributes:
      name: of the tensor. expert: index into its leading dim, None where it is the whole tensor.
      head_size: rows of a head whose halves are interleaved; 0: they lie as they are.
      plus_one: whether 1 was added.
    """

    name: str
    expert: int | None
    head_size: int = 0
    plus_one: bool = False
    cut: Cut | None = None


def places(
    layout: GgufLayout, config: ModelConfig, table: list[Weight], names: Collection[str] = ()
) -> dict[str, list[Place]]:
    """Hugging Face's name -> place of every tensor of a model; several where it is cut apart.

    names: of the file's tensors, of one that exists: early files do not cut DeepSeek's.
    """
    first, offsets = 0, {}
    for run in config.runs:
        offsets[run.name] = first
        first += run.num_layers
    found: dict[str, list[Place]] = {}
    for weight in table:
        path, number = weight.path, ""
        if path.startswith("layers/"):
            _, run_name, path = path.split("/", 2)
            number = str(offsets[run_name] + (weight.layer or 0))
        if path == "attn/w_kv_up":
            found[weight.hf_name] = _keys_and_values(config, number, names)
            continue
        name = layout.names.get(path) or NAMES.get(path)
        if name is None:
            raise InputError(f"{weight.path} has no name in GGUF: use --format=orbax")
        head_size = config.head_size if path in layout.paired else 0
        place = Place(
            name.replace("{i}", number), weight.expert, head_size, path.endswith("/delta")
        )
        found[weight.hf_name] = [place]
    return found


def _keys_and_values(config: ModelConfig, number: str, names: Collection[str]) -> list[Place]:
    assert config.mla is not None
    whole = f"blk.{number}.attn_kv_b.weight"
    if whole in names:
        return [Place(whole, None)]
    keys, size = config.mla.nope_size, config.mla.nope_size + config.mla.v_size
    return [
        Place(f"blk.{number}.attn_k_b.weight", None, cut=Cut(0, keys, size, True)),
        Place(f"blk.{number}.attn_v_b.weight", None, cut=Cut(keys, size, size, False)),
    ]
