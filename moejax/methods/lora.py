"""Low-rank adaptation (LoRA, arXiv 2106.09685): W + (alpha / R) A B, the base frozen.

A is drawn N(0, 1 / inputs), B is zero, so the first forward pass is the base's. Adapters may stand
at any weight of a layer, every expert having its own pair. `attach` gives the tree that the model
is run with, `merge` one without adapters. `moejax.models.adapted` puts W and A B together layer by
layer, so a training step costs the arithmetic of full fine-tuning and saves its memory: gradients
and moments are of the factors alone.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.adapted import adapted, adapter_shapes, is_matrix

# Every linear map of a layer but the router; the paper of ESFT adapts all but embeddings and head.
TARGETS = ("attn/w_*", "mlp/w_*", "moe/experts/w_*", "moe/shared/w_*")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """rank: R. alpha: the factors' product is times alpha / R. targets: patterns of the paths of a
    layer's weights. seed: of A."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS
    seed: int = 0

    def __post_init__(self):
        if self.rank < 1:
            raise InputError(f"LoRA's rank must be 1 or more, got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InputError(f"LoRA's alpha must be above 0, got {self.alpha}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def abstract_adapters(params: tree.Tree, config: LoraConfig) -> tree.Tree:
    """Shapes of the adapters of a model: ``layers/<run>/lora/<path>/{a, b}``, float32.

    Raises InputError for a target that fits no weight.
    """
    found: dict[str, jax.ShapeDtypeStruct] = {}
    unused = set(config.targets)
    for run, layers in params["layers"].items():
        for path, leaf in tree.flatten(layers).items():
            fitting = [t for t in config.targets if tree.matches(path, t)]
            if not fitting or not is_matrix(path, leaf.shape[1:]):
                continue
            unused -= set(fitting)
            for part, shape in adapter_shapes(path, leaf.shape[1:], config.rank).items():
                name = f"layers/{run}/lora/{path}/{part}"
                found[name] = jax.ShapeDtypeStruct((leaf.shape[0], *shape), jnp.float32)
    wrong = sorted(unused - set(TARGETS)) or ([] if found else list(config.targets))
    if wrong:
        raise InputError(f"LoRA's target {wrong[0]!r} fits no linear map of this model's layers")
    return tree.unflatten(found)


def init_adapters(params: tree.Tree, config: LoraConfig) -> tree.Tree:
    """Fresh adapters: A random, B zero."""
    flat = tree.flatten(abstract_adapters(params, config))
    keys = jax.random.split(jax.random.key(config.seed), len(flat))

    def leaf(key, path, shape):
        if path.endswith("/b"):
            return jnp.zeros(shape, jnp.float32)
        return jax.random.normal(key, shape) / math.sqrt(shape[-2])

    pairs = zip(keys, flat.items(), strict=True)
    return tree.unflatten({path: leaf(key, path, like.shape) for key, (path, like) in pairs})


def attach(adapters: tree.Tree, params: tree.Tree, config: LoraConfig) -> tree.Tree:
    """The model's tree with adapters in it, A times alpha / R; what `forward` takes."""
    scaled = tree.map_with_path(
        lambda path, x: x * config.scale if path.endswith("/a") else x, adapters
    )
    return tree.join(params, scaled)


def merge(adapters: tree.Tree, params: tree.Tree, config: LoraConfig) -> tree.Tree:
    """The model with W + (alpha / R) A B in W's place, on the host, in W's dtype.

    Leaves without an adapter are the same objects.
    """
    attached = attach(jax.tree.map(np.asarray, adapters), params, config)
    flat = dict(tree.flatten(params))
    for run, layers in attached["layers"].items():
        if "lora" not in layers:
            continue
        targets = {path.rsplit("/", 1)[0] for path in tree.flatten(layers["lora"])}
        num_layers = jax.tree.leaves(layers)[0].shape[0]
        parts: dict[str, list[np.ndarray]] = {path: [] for path in targets}
        for i in range(num_layers):  # one at a time: a float32 copy of a layer, not of the model
            whole = tree.flatten(adapted(jax.tree.map(lambda w, i=i: w[i], layers)))
            for path in targets:
                dtype = flat[f"layers/{run}/{path}"].dtype
                parts[path].append(np.asarray(whole[path]).astype(dtype))
        for path in targets:
            flat[f"layers/{run}/{path}"] = np.stack(parts[path])
    return tree.unflatten(flat)
