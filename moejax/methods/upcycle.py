"""Upcycling: a dense model becomes a mixture of experts that computes the same function.

Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055) as XFT does it (arXiv 2404.15247, section
3.1): every expert, the shared one too, is an exact copy of the layer's feed-forward network, and
only the router is new. With weights that sum to one the copies add up to the original.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig
from moejax.moe.routing import init_router


def moe_config(config: ModelConfig, moe: MoEConfig) -> ModelConfig:
    """The upcycled model's config: the dense one's, rope and all, with experts."""
    if config.moe is not None:
        raise InputError(
            f"this model already has {config.moe.num_experts} experts: upcycling starts from a "
            "dense model."
        )
    if moe.expert_ffn not in (None, config.d_ff):
        raise InputError(
            f"expert_ffn={moe.expert_ffn}: experts are copies of feed-forward layers of width "
            f"{config.d_ff}: leave expert_ffn out or choose {config.d_ff}."
        )
    if moe.shared_ffn:
        raise InputError(
            f"shared_ffn={moe.shared_ffn}: upcycling has no weights for a network beside the "
            "experts: choose shared_ffn=0."
        )
    return dataclasses.replace(config, moe=moe)


def upcycle(
    params: tree.Tree, config: ModelConfig, moe: MoEConfig, key: jax.Array
) -> tuple[tree.Tree, ModelConfig]:
    """Turns every feed-forward layer into `moe.num_experts` copies of itself and a fresh router.

    layers/<run>/mlp/<name> [L, ...] -> layers/<run>/moe/experts/<name> [L, E, ...], bit for bit;
    the rest is the same arrays, not copied. key seeds the routers, which take the dtype of the
    feed-forward weights. Returns the MoE's parameters and config. Raises InputError for a model
    that has experts already.
    """
    new_config = moe_config(config, moe)
    keys = jax.random.split(key, len(config.runs))
    layers = {
        run.name: _upcycle_run(params["layers"][run.name], config.d_model, moe, run_key)
        for run, run_key in zip(config.runs, keys, strict=True)
    }
    return {**params, "layers": layers}, new_config


def _upcycle_run(layer: dict[str, Any], d_model: int, moe: MoEConfig, key: jax.Array) -> tree.Tree:
    """One run of L stacked layers."""
    num_layers = layer["mlp"]["w_up"].shape[0]
    dtype = layer["mlp"]["w_up"].dtype
    keys = jax.random.split(key, num_layers)
    init = jax.vmap(lambda layer_key: init_router(layer_key, d_model, moe, dtype))
    router = jax.jit(init)(keys)  # one program, not one per operation
    experts = {
        name: jnp.broadcast_to(w[:, None], (w.shape[0], moe.num_experts, *w.shape[1:]))
        for name, w in layer["mlp"].items()
    }
    carried = {name: part for name, part in layer.items() if name != "mlp"}
    return {**carried, "moe": {"experts": experts, "router": router}}
