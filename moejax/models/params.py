"""The parameter tree of a model: its shapes, and random weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moejax.core import tree
from moejax.models.config import LayerRun, ModelConfig
from moejax.models.layers import feed_forward_shapes, norm_shapes
from moejax.models.mha import attention_shapes
from moejax.models.mla import mla_shapes
from moejax.moe.layer import moe_shapes


def abstract_params(config: ModelConfig, dtype: Any = "float32") -> tree.Tree:
    """Shapes and dtypes of the whole tree, before any array exists.

    ``embed/tokens [V, D]``, ``layers/<run>/{attn_norm,attn,mlp_norm,mlp|moe}/...`` stacked on a
    leading L, ``final_norm/scale [D]``, and ``lm_head/w [D, V]`` unless tied. Where the config asks
    for it: ``embed/positions [P, D]``, ``embed/w_in`` and ``embed/w_out`` around an embedding of
    another size, ``attn_post_norm`` and ``mlp_post_norm``; norms have the leaves of their kind.
    """
    d, size = config.d_model, config.embed_size
    shapes: dict[str, tuple[int, ...]] = {"embed/tokens": (config.vocab_size, size)}
    if config.embedding.positions == "learned":
        shapes["embed/positions"] = (config.max_position + config.embedding.position_offset, d)
    if config.embedding.size is not None:
        shapes |= {"embed/w_in": (size, d), "embed/w_out": (d, size)}
    for run in config.runs:
        for path, shape in _layer_shapes(config, run).items():
            shapes[f"layers/{run.name}/{path}"] = (run.num_layers, *shape)
    if config.norms.final:
        shapes |= _below("final_norm", norm_shapes(config.norms.kind, d))
    if not config.tie_embeddings:
        shapes["lm_head/w"] = (size, config.vocab_size)
    # A selection bias moves in steps of 0.001, which bfloat16 loses.
    dtypes = {path: "float32" if path.endswith("/b_select") else dtype for path in shapes}
    return tree.unflatten(
        {path: jax.ShapeDtypeStruct(shape, dtypes[path]) for path, shape in shapes.items()}
    )


def _below(part: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{part}/{name}": shape for name, shape in shapes.items()}


def _layer_shapes(config: ModelConfig, run: LayerRun) -> dict[str, tuple[int, ...]]:
    norm = norm_shapes(config.norms.kind, config.d_model)
    if config.mla is None:
        attention = attention_shapes(config)
    else:
        bias = config.attention_bias
        attention = mla_shapes(config.d_model, config.num_heads, config.mla, bias)
    shapes = _below("attn_norm", norm) | _below("attn", attention)
    shapes |= _below("mlp_norm", norm)
    if config.norms.placement == "sandwich":
        shapes |= _below("attn_post_norm", norm) | _below("mlp_post_norm", norm)
    if run.kind == "dense":
        return shapes | _below("mlp", feed_forward_shapes(config))
    assert config.moe is not None
    moe = moe_shapes(config.d_model, config.d_ff, config.moe, config.mlp_bias)
    return shapes | _below("moe", moe)


def init_leaf(path: str, key: jax.Array, leaf: jax.ShapeDtypeStruct, scale: float) -> jax.Array:
    """Random weights N(0, scale^2); norm scales one; biases and the router's noise zero."""
    name = path.rsplit("/", 1)[-1]
    if name == "scale":
        return jnp.ones(leaf.shape, leaf.dtype)
    if name.startswith("b_") or name in ("bias", "delta", "w_noise"):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return (scale * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)


def init_params(config: ModelConfig, key: jax.Array, dtype: Any = "float32") -> tree.Tree:
    """Random parameters for training from scratch."""
    flat = tree.flatten(abstract_params(config, dtype))
    keys = jax.random.split(key, len(flat))
    return tree.unflatten(
        {
            path: init_leaf(path, k, leaf, config.initializer_range)
            for k, (path, leaf) in zip(keys, flat.items(), strict=True)
        }
    )
