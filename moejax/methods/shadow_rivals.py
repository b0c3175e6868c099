"""Training-free rivals: thresholds on activations (TEAL, CATS), a choice by the prompt (GRIFFIN).

They run in the same forward pass as the masks, on what follows the prompt.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.models.inserted import Inserted
from moejax.models.masked import by_run, seen_of
from moejax.models.transformer import ForwardOptions, forward

# What each thresholds: the inputs of these products.
PLACES = {
    "teal": ("attn_in", "heads", "mlp_in", "neurons"),
    "cats": ("gate",),
}


def sizes_at(params: tree.Tree, config: ModelConfig, tokens_BT: jax.Array, rule: str) -> Any:
    """Absolute values at a rule's places, {place: [L, B, T, ..]}: what thresholds come from.

    NaN of experts that a token did not choose: those of the others are cut.
    """
    places = PLACES[rule]
    watch = {place: (lambda part, x: (x, jnp.abs(x))) for place in places}
    out = _watched(params, config, tokens_BT, Watch(watch))
    found = {place: out[place] for place in places}
    for place in ("gate", "neurons"):
        if config.moe is not None and place in found:
            chosen = jnp.any(found[place] > 0, axis=-1, keepdims=True)
            found[place] = jnp.where(chosen, found[place], jnp.nan)
    return found


class Watch:
    """Functions at places, hashed by identity: an argument that a program may depend on."""

    def __init__(self, places: dict[str, Any]):
        self.places = places


@functools.partial(jax.jit, static_argnames=("config", "watch"))
def _watched(params, config: ModelConfig, tokens_BT, watch: Watch):
    options = ForwardOptions(attention="dense")
    inserted = Inserted(**watch.places)
    out = forward(params, config, tokens_BT, options=options, inserted=inserted)
    return seen_of(config, out.seen)


def thresholds(values: dict[str, np.ndarray], sparsity: float) -> dict[str, np.ndarray]:
    """Per place float32 [L]: the `sparsity` quantile of a layer's absolute values.

    values: per place [L, anything] of calibration texts, NaN left out. TEAL (arXiv 2408.14690,
    section 4.1) and CATS (arXiv 2404.08763, eq. 3) both cut at the empirical quantile; TEAL's
    search for uneven shares per layer is left out.
    """
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity {sparsity:g} lies outside [0, 1)")

    def of_layer(values: np.ndarray) -> float:
        there = values[np.isfinite(values)]
        return float(np.quantile(there, sparsity)) if there.size else 0.0

    return {
        place: np.array([of_layer(layer) for layer in v], np.float32) for place, v in values.items()
    }


def thresholding(config: ModelConfig, limits: dict[str, jax.Array]) -> Inserted:
    """Zeroes what is smaller than its layer's limit, token by token.

    limits: as `thresholds` gives them. Of "gate", act(gate) is zeroed and with it the neuron.
    """
    layers = by_run(config, limits)

    def change(place: str):
        return lambda part, x: (jnp.where(jnp.abs(x) < part[place], 0, x), None)

    return Inserted(layers=layers, **{place: change(place) for place in limits})


def griffin(a_BTF: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """GRIFFIN's statistic of a prompt, [B, F] (arXiv 2404.01365, section 4.2).

    s_j = || a_j / |a_t| || over the prompt's tokens t, |a_t| the norm of the token's activations.
    mask_BT: true on the prompt's tokens.
    """
    flat_BTF = a_BTF.reshape(*a_BTF.shape[:2], -1)
    size_BT1 = jnp.linalg.norm(flat_BTF, axis=-1, keepdims=True)
    unit_BTF = flat_BTF / jnp.where(size_BT1 > 0, size_BT1, 1)
    return jnp.sqrt(jnp.sum(jnp.square(unit_BTF) * mask_BT[..., None], axis=1))
