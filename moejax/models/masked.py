"""Masks and probes of heads and neurons inside the decoder, as `Inserted` functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.config import LayerRun, ModelConfig
from moejax.models.inserted import Inserted


def neuron_shape(config: ModelConfig, run: LayerRun) -> tuple[int, ...]:
    """(F,) of a dense layer, (E, F) of one with experts."""
    if run.kind == "dense":
        return (config.d_ff,)
    assert config.moe is not None
    return (config.moe.num_experts, config.moe.expert_ffn or config.d_ff)


def one_neuron_shape(config: ModelConfig) -> tuple[int, ...]:
    """`neuron_shape` of a model whose layers are all alike; InputError if they are not."""
    shapes = {neuron_shape(config, run) for run in config.runs}
    if len(shapes) > 1:
        raise InputError(
            f"layers with neurons of {len(shapes)} shapes ({sorted(shapes)}): a mask needs layers "
            "that are all dense or all of experts"
        )
    return shapes.pop()


def by_run(config: ModelConfig, part_L: Any) -> dict[str, Any]:
    """Leaves [L, ...] of the whole model cut into its runs, as `Inserted.layers` wants them."""
    found, first = {}, 0
    for run in config.runs:
        last = first + run.num_layers
        found[run.name] = jax.tree.map(lambda x, a=first, b=last: x[a:b], part_L)
        first = last
    return found


def masking(
    config: ModelConfig, heads_LBH: jax.Array, neurons: jax.Array, dense_B: Any = None
) -> Inserted:
    """Multiplies each head's context and each neuron's activation by its factor.

    heads_LBH: [L, B, H], neurons: [L, B, F] or, of experts, [L, B, E, F]; B is that of the tokens,
    or 1 for one mask of all rows. dense_B: tokens at the start of each row that stay dense, as a
    prompt does that is read before its mask is known; None: none.

    All ones is the dense model bit for bit; of experts, whose hidden layers are computed another
    way with a function inside, up to rounding: `mask_experts` is exact there.
    """
    layers = by_run(config, {"heads": heads_LBH, "neurons": neurons})

    def factor(mask, x):
        after = (1,) * (x.ndim - mask.ndim - 1)
        mask = mask.reshape(mask.shape[0], 1, *mask.shape[1:], *after)
        if dense_B is not None:
            later_BT = jnp.arange(x.shape[1]) >= jnp.asarray(dense_B)[:, None]
            mask = jnp.where(later_BT.reshape(*later_BT.shape, *(1,) * (x.ndim - 2)), mask, 1)
        return mask.astype(x.dtype)

    return Inserted(
        heads=lambda part, x: (x * factor(part["heads"], x), None),
        neurons=lambda part, x: (x * factor(part["neurons"], x), None),
        layers=layers,
    )


def mask_experts(params: tree.Tree, config: ModelConfig, neurons_LEF: jax.Array) -> tree.Tree:
    """Params whose experts' neurons are multiplied by one mask of all rows: rows of w_down are.

    (m * a) W = a (m * W), so the strategies of the MoE layer need not know of it.
    """
    flat = tree.flatten(params)
    for name, part_LEF in by_run(config, neurons_LEF).items():
        path = f"layers/{name}/moe/experts/w_down"
        flat[path] = flat[path] * part_LEF[..., None].astype(flat[path].dtype)
    return tree.unflatten(flat)


def probing(config: ModelConfig, heads_LBTHC: jax.Array, neurons: jax.Array) -> Inserted:
    """Adds probes to both places and records what was there before.

    With probes of zeros nothing changes and dL/dprobe is dL/dx, so that one backward pass gives
    gradients and `Output.seen` the values. neurons: [L, B, T, F] or [L, B, T, E, F].
    """
    layers = by_run(config, {"heads": heads_LBTHC, "neurons": neurons})

    def change(place):
        return lambda part, x: (x + part[place].astype(x.dtype), x)

    return Inserted(heads=change("heads"), neurons=change("neurons"), layers=layers)


def seen_of(config: ModelConfig, seen: dict[str, Any]) -> dict[str, jax.Array]:
    """`Output.seen` of runs joined: "heads" and "neurons", [L, ...]."""
    runs = [seen[run.name] for run in config.runs]
    return {place: jnp.concatenate([run[place] for run in runs]) for place in runs[0]}
