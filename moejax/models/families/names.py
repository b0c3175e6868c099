"""A name table out of module names: which Hugging Face tensor lies where in our tree."""

from __future__ import annotations

from collections.abc import Mapping

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.models.families.family import Weight
from moejax.models.params import abstract_params

# Modules by our name, as most families since Llama call them; {i} is the layer, {e} the expert.
LLAMA_MODULES = {
    "embed/tokens": "model.embed_tokens",
    "attn_norm": "model.layers.{i}.input_layernorm",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "attn/q": "model.layers.{i}.self_attn.q_proj",
    "attn/k": "model.layers.{i}.self_attn.k_proj",
    "attn/v": "model.layers.{i}.self_attn.v_proj",
    "attn/o": "model.layers.{i}.self_attn.o_proj",
    "attn/q_norm": "model.layers.{i}.self_attn.q_norm",
    "attn/k_norm": "model.layers.{i}.self_attn.k_norm",
    "mlp/gate": "model.layers.{i}.mlp.gate_proj",
    "mlp/up": "model.layers.{i}.mlp.up_proj",
    "mlp/down": "model.layers.{i}.mlp.down_proj",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
}


def name_table(config: ModelConfig, modules: Mapping[str, str]) -> list[Weight]:
    """Every leaf of a config's tree with its tensors' names.

    modules: our module -> theirs. A leaf ``.../w_x`` or ``.../b_x`` belongs to module ``.../x``, a
    norm's leaves to the norm, ``embed/tokens`` and ``embed/positions`` to themselves; weight or
    bias is told by the leaf. A name for the leaf itself, with its suffix, goes before that.
    """
    table, first = [], 0
    for path, leaf in tree.flatten(abstract_params(config)).items():
        if not path.startswith("layers/"):
            table.append(_weight(path, path, leaf.shape, modules))
    for run in config.runs:
        leaves = tree.flatten(abstract_params(config)["layers"][run.name])
        for i in range(run.num_layers):
            for path, leaf in leaves.items():
                whole = f"layers/{run.name}/{path}"
                shape = leaf.shape[1:]
                experts: list[int | None] = [None]
                if path.startswith("moe/experts/"):
                    experts, shape = [*range(shape[0])], shape[1:]
                table += [_weight(whole, path, shape, modules, (i, first + i), e) for e in experts]
        first += run.num_layers
    return table


def _weight(path, local, shape, modules, layer=(None, None), expert=None) -> Weight:
    module, suffix = _module(local)
    whole = modules.get(local) if local != module else None
    if whole is None and module not in modules:
        raise InputError(
            f"{path} has no name in this family's Hugging Face class: use --format=orbax"
        )
    pattern = whole or f"{modules[module]}.{suffix}"
    index, number = layer
    name = pattern.format(i=number, e=expert)
    return Weight(path, index, name, tuple(shape), _in_dims(local), expert)


def _module(path: str) -> tuple[str, str]:
    """Our module of a leaf, and "weight" or "bias"."""
    parent, leaf = path.rsplit("/", 1)
    suffix = "bias" if leaf == "bias" or leaf.startswith("b_") else "weight"
    if leaf.startswith(("w_", "b_")):
        return f"{parent}/{leaf[2:]}", suffix
    return (path if parent == "embed" else parent), suffix


def _in_dims(path: str) -> int:
    """How many leading dims of a leaf are inputs of a linear map: attention's output has two."""
    leaf = path.rsplit("/", 1)[1]
    if leaf == "w_o":
        return 2
    return 1 if leaf == "w" or leaf.startswith("w_") else 0
