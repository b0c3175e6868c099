"""What families with experts share: the names of their modules, and fields of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.models.families.fields import require
from moejax.models.families.names import LLAMA_MODULES

# Files hold one tensor per expert; transformers 5 stacks them only in memory.
EXPERT_MODULES = LLAMA_MODULES | {
    "moe/router/out": "model.layers.{i}.mlp.gate",
    "moe/experts/gate": "model.layers.{i}.mlp.experts.{e}.gate_proj",
    "moe/experts/up": "model.layers.{i}.mlp.experts.{e}.up_proj",
    "moe/experts/down": "model.layers.{i}.mlp.experts.{e}.down_proj",
}

# router_aux_loss_coef weighs transformers' loss, which is one for all layers.
HF_BALANCE: dict[str, Any] = {"balance": "pooled"}


def shared_modules(name: str) -> dict[str, str]:
    """The modules of a network called so that every token passes beside the experts."""
    parts = ("gate", "up", "down")
    return {f"moe/shared/{x}": f"model.layers.{{i}}.mlp.{name}.{x}_proj" for x in parts}


def experts_from_hf(family: str, fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`MoEConfig`'s num_experts and top_k, the first of them out of the field `name`."""
    # transformers 5 writes some families' number by this other name.
    num_experts = fields.get(name) or fields.get("num_local_experts")
    require({name: num_experts, **fields}, (name, "num_experts_per_tok"), family)
    return {"num_experts": num_experts, "top_k": fields["num_experts_per_tok"]}


def weighting_from_hf(fields: Mapping[str, Any]) -> str:
    """`MoEConfig.weighting` by norm_topk_prob."""
    return "renormalized" if fields.get("norm_topk_prob") else "scores"


def dense_layers_from_hf(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`ModelConfig`'s num_dense_layers and later_dense.

    Layer i is dense where mlp_only_layers names it or decoder_sparse_step does not divide i + 1.
    """
    num_layers = fields["num_hidden_layers"]
    step, named = fields.get("decoder_sparse_step") or 1, fields.get("mlp_only_layers") or ()
    dense = [i for i in range(num_layers) if i in named or (i + 1) % step]
    if len(dense) == num_layers or any(not 0 <= i < num_layers for i in named):
        raise InputError(
            f"config.json: decoder_sparse_step {step} and mlp_only_layers {list(named)} make "
            f"{dense} of {num_layers} layers dense: name layers that are there, and leave one"
        )
    first = next(i for i, layer in enumerate([*dense, num_layers]) if i != layer)
    return {"num_dense_layers": first, "later_dense": tuple(dense[first:])}


def dense_layers_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields that `dense_layers_from_hf` reads."""
    return {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}
