"""The parameters of an MoE layer: their shapes, and fresh ones."""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.moe.config import MoEConfig
from moejax.moe.routing import abstract_router, init_router
from moejax.ops.gated_ffn import ffn_shapes

EXPERT_STDDEV = 0.02


def moe_shapes(
    d_model: int, d_ff: int, config: MoEConfig, bias: bool = False
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of all of a layer's parameters.

    experts/{w_gate,w_up [E, D, F], w_down [E, F, D]} with F = config.expert_ffn or d_ff, router/...
    and with a shared network shared/{w_gate,w_up,w_down} and, if it is gated, shared/w_mix [D, 1].
    bias adds b_gate, b_up, b_down to each network.
    """
    expert = ffn_shapes(d_model, config.expert_ffn or d_ff, bias)
    shapes = {f"experts/{name}": (config.num_experts, *dims) for name, dims in expert.items()}
    shapes |= {f"router/{name}": dims for name, dims in abstract_router(d_model, config).items()}
    if config.shared_ffn:
        shared = ffn_shapes(d_model, config.shared_ffn, bias)
        shapes |= {f"shared/{name}": dims for name, dims in shared.items()}
    if config.shared_gate:
        shapes["shared/w_mix"] = (d_model, 1)
    return shapes


def init_moe(
    key: jax.Array,
    d_model: int,
    d_ff: int,
    config: MoEConfig,
    *,
    bias: bool = False,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> dict[str, Any]:
    """Fresh parameters of one layer: a router of `init_router`, weights N(0, 0.02), biases zero."""
    router_key, key = jax.random.split(key)
    params: dict[str, Any] = {"router": init_router(router_key, d_model, config, dtype)}
    for index, (path, shape) in enumerate(moe_shapes(d_model, d_ff, config, bias).items()):
        part, name = path.split("/")
        if part == "router":
            continue
        leaf = jnp.zeros(shape, dtype)
        if not name.startswith("b_"):
            draw = jax.random.normal(jax.random.fold_in(key, index), shape)
            leaf = (EXPERT_STDDEV * draw).astype(dtype)
        params.setdefault(part, {})[name] = leaf
    return params
