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
    """`neuron_shape` of the layers that masks and scores are of: the last ones'.

    First layers of another shape, as the dense one before DeepSeek-V2's experts, are never masked
    and their neurons' scores are zeros (`check_alike`).
    """
    return neuron_shape(config, config.runs[-1])


def check_alike(config: ModelConfig, first: int) -> None:
    """InputError unless all layers from `first` on have neurons of one shape."""
    end = 0
    for run in config.runs:
        end += run.num_layers
        shape, last = neuron_shape(config, run), one_neuron_shape(config)
        if shape != last and end > first:
            raise InputError(
                f"layer {end - 1} has neurons of shape {list(shape)}, the last one {list(last)}: a "
                "mask needs layers that are all dense or all of experts, but for the first ones, "
                f"which are never pruned (mask.first, now {first})"
            )


def is_masked(config: ModelConfig, run: LayerRun) -> bool:
    """Whether a run's neurons have the shape that masks are of."""
    return neuron_shape(config, run) == one_neuron_shape(config)


def by_run(config: ModelConfig, part_L: Any) -> dict[str, Any]:
    """Leaves [L, ...] of the whole model cut into its runs, as `Inserted.layers` wants them."""
    found, first = {}, 0
    for run in config.runs:
        last = first + run.num_layers
        found[run.name] = jax.tree.map(lambda x, a=first, b=last: x[a:b], part_L)
        first = last
    return found


def _of_places(config: ModelConfig, heads_L: Any, neurons_L: Any) -> dict[str, Any]:
    """`Inserted.layers` of both places; without neurons where a run has others."""
    layers = by_run(config, {"heads": heads_L, "neurons": neurons_L})
    for run in config.runs:
        if not is_masked(config, run):
            del layers[run.name]["neurons"]
    return layers


def masking(
    config: ModelConfig, heads_LBH: jax.Array, neurons: jax.Array, dense_B: Any = None
) -> Inserted:
    """Multiplies each head's context and each neuron's activation by its factor.

    heads_LBH: [L, B, H], neurons: [L, B, F] or, of experts, [L, B, E, F]; B is that of the tokens,
    or 1 for one mask of all rows. With a mask for every token both have T after B. dense_B: tokens
    at the start of each row that stay dense, as of a prompt that is read before its mask is known;
    None: none.

    All ones is the dense model bit for bit; of experts, whose hidden layers are computed another
    way with a function inside, up to rounding: `mask_experts` is exact there.
    """
    layers, by_token = _of_places(config, heads_LBH, neurons), heads_LBH.ndim == 4

    def factor(mask, x):
        mask = mask if by_token else mask[:, None]
        mask = mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))
        if dense_B is not None:
            later_BT = jnp.arange(x.shape[1]) >= jnp.asarray(dense_B)[:, None]
            mask = jnp.where(later_BT.reshape(*later_BT.shape, *(1,) * (x.ndim - 2)), mask, 1)
        return mask.astype(x.dtype)

    def change(place: str):
        return lambda part, x: (x * factor(part[place], x) if place in part else x, None)

    return Inserted(heads=change("heads"), neurons=change("neurons"), layers=layers)


def mask_experts(params: tree.Tree, config: ModelConfig, neurons_LEF: jax.Array) -> tree.Tree:
    """Params whose experts' neurons are multiplied by one mask of all rows: rows of w_down are.

    (m * a) W = a (m * W), so the strategies of the MoE layer need not know of it.
    """
    flat = tree.flatten(params)
    for name, part_LEF in by_run(config, neurons_LEF).items():
        path = f"layers/{name}/moe/experts/w_down"
        if path in flat:
            flat[path] = flat[path] * part_LEF[..., None].astype(flat[path].dtype)
    return tree.unflatten(flat)


def probing(config: ModelConfig, heads_LBTHC: jax.Array, neurons: jax.Array) -> Inserted:
    """Adds probes to both places and records what was there before.

    With probes of zeros nothing changes and dL/dprobe is dL/dx, so that one backward pass gives
    gradients and `Output.seen` the values. neurons: [L, B, T, F] or [L, B, T, E, F].
    """
    layers = _of_places(config, heads_LBTHC, neurons)

    def change(place: str):
        return lambda part, x: (x + part[place].astype(x.dtype) if place in part else x, x)

    return Inserted(heads=change("heads"), neurons=change("neurons"), layers=layers)


def seen_of(config: ModelConfig, seen: dict[str, Any]) -> dict[str, jax.Array]:
    """`Output.seen` of runs joined, [L, ...]; zeros for neurons of runs that are never masked."""

    def part(run: LayerRun, place: str) -> jax.Array:
        x = seen[run.name][place]
        if place not in ("gate", "neurons") or is_masked(config, run):
            return x
        return jnp.zeros((run.num_layers, *places[place].shape[1:]), x.dtype)

    places = seen[config.runs[-1].name]
    return {place: jnp.concatenate([part(run, place) for run in config.runs]) for place in places}
