"""What llama.cpp calls the fields and tensors of each family: data, read in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.models.families import Weight


class Field(NamedTuple):
    """One field of a config: its key below the architecture's name, and config.json's name."""

    key: str
    hf: str
    kind: type = int
    required: bool = True


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
    # The first that a file has counts; all are written.
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

    Norms that multiply by 1 + w (leaves called delta) are stored with the 1 added.
    """

    family: str
    architecture: str
    experts: bool = False
    fields: tuple[Field, ...] = ()
    implied: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda fields: {}
    paired: tuple[str, ...] = ()


def _gemma2(fields: dict[str, Any]) -> dict[str, Any]:
    # llama.cpp knows the 27B model, whose queries are scaled by another size, by its layers.
    of_heads = fields["hidden_size"] // fields["num_attention_heads"]
    is_27b = fields["num_hidden_layers"] == 46
    return {"query_pre_attn_scalar": of_heads if is_27b else fields["head_dim"] or of_heads}


_PAIRED = ("attn/w_q", "attn/w_k", "attn/b_q", "attn/b_k")
LAYOUTS = (
    GgufLayout("llama", "llama", paired=_PAIRED),
    GgufLayout(
        "mixtral",
        "llama",
        True,
        (Field("expert_count", "num_local_experts"), _ROUTED[1]),
        paired=_PAIRED,
    ),
    GgufLayout("qwen2", "qwen2"),
    GgufLayout("qwen3", "qwen3"),
    GgufLayout(
        "gemma2",
        "gemma2",
        fields=(
            Field("attn_logit_softcapping", "attn_logit_softcapping", float, False),
            Field("final_logit_softcapping", "final_logit_softcapping", float, False),
            Field("attention.sliding_window", "sliding_window", required=False),
        ),
        implied=_gemma2,
    ),
    GgufLayout("olmoe", "olmoe", True, _ROUTED),
    GgufLayout(
        "qwen2_moe",
        "qwen2moe",
        True,
        (
            *_ROUTED,
            _WIDTH,
            Field("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        ),
    ),
    GgufLayout(
        "qwen3_moe", "qwen3moe", True, (*_ROUTED, _WIDTH), lambda fields: {"norm_topk_prob": True}
    ),
)


def layout_of(config: ModelConfig) -> GgufLayout:
    """The layout of a model's family; InputError where llama.cpp has none that moejax knows."""
    for layout in LAYOUTS:
        if layout.family == config.family and layout.experts == (config.moe is not None):
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


class Place(NamedTuple):
    """Where a Hugging Face tensor lies in a file, and how.

    Attributes:
      name: of the tensor. expert: index into its leading dim, None where it is the whole tensor.
      head_size: rows of a head whose halves are interleaved; 0: they lie as they are.
      plus_one: whether 1 was added.
    """

    name: str
    expert: int | None
    head_size: int
    plus_one: bool


def places(layout: GgufLayout, config: ModelConfig, table: list[Weight]) -> dict[str, Place]:
    """Hugging Face's name -> place of every tensor of a model."""
    first, offsets = 0, {}
    for run in config.runs:
        offsets[run.name] = first
        first += run.num_layers
    found = {}
    for weight in table:
        path, number = weight.path, ""
        if path.startswith("layers/"):
            _, run_name, path = path.split("/", 2)
            number = str(offsets[run_name] + (weight.layer or 0))
        if path not in NAMES:
            raise InputError(f"{weight.path} has no name in GGUF: use --format=orbax")
        found[weight.hf_name] = Place(
            NAMES[path].replace("{i}", number),
            weight.expert,
            config.head_size if path in layout.paired else 0,
            path.endswith("/delta"),
        )
    return found
