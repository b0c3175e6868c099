"""What decoding needs beforehand: weights laid out for it, prompts checked, sizes rounded up."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.models.transformer import split_layers


def prepare(params: tree.Tree, compute_dtype: str = "float32") -> tree.Tree:
    """The tree as decoding reads it: one array per layer, in the dtype of the arithmetic.

    Slicing stacked weights or converting them would copy all of them for every token. Takes a
    second copy of the layers; does nothing to a tree that it made.
    """

    def cast(path, w):
        # Routers keep their own precision, as in `forward`.
        is_router = any(getattr(key, "key", None) == "router" for key in path)
        return jnp.asarray(w) if is_router else jnp.asarray(w, compute_dtype)

    if not any(isinstance(run, tuple) for run in params["layers"].values()):
        params = params | {"layers": _split(params["layers"])}
    return jax.tree_util.tree_map_with_path(cast, params)


def context_length(config: ModelConfig) -> int:
    """Most tokens, prompt and answer together, that the model is said to read."""
    if config.rope.kind == "dynamic":
        stretched = int(config.rope.factor * config.rope.original_max_position)
        return max(config.max_position, stretched)
    return config.max_position


def bucket(length: int) -> int:
    """Room for `length` tokens: a multiple of 32, coarser from 256 on.

    At most a fifth is left over beyond 160, and lengths up to n make O(log n) shapes.
    """
    step = max(32, (1 << length.bit_length()) >> 3)
    return max(1, -(-length // step)) * step


def power_of_two(number: int, least: int = 1) -> int:
    """The least power of two that is no smaller than either."""
    return max(least, 1 << (number - 1).bit_length())


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
    """Raises InputError, naming the first prompt that cannot be continued."""
    context = context_length(config)
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {row} is empty: give at least one token")
        if len(prompt) >= context:
            raise InputError(
                f"prompt {row} has {len(prompt)} tokens and the model reads {context}, answer "
                "included: shorten the prompt"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= config.vocab_size:
            raise InputError(
                f"prompt {row} has token id {high if low >= 0 else low} and the model knows 0 to "
                f"{config.vocab_size - 1}: does the tokenizer belong to the model?"
            )


def check_room(prompt: Sequence[int], max_length: int) -> None:
    """Raises InputError where a row of max_length tokens has no room for an answer."""
    if len(prompt) >= max_length:
        raise InputError(
            f"the prompt has {len(prompt)} tokens and a row here has room for {max_length}, answer "
            "included: shorten the prompt or raise max_length"
        )


def cache_place(params: tree.Tree, config: ModelConfig) -> NamedSharding | None:
    """Where the cache lies if the parameters lie on a mesh of several devices."""
    places = (w.sharding for w in jax.tree.leaves(params) if isinstance(w, jnp.ndarray))
    mesh = next((p.mesh for p in places if isinstance(p, NamedSharding)), None)
    if mesh is None:
        return None
    tensor = mesh.shape.get("tensor", 1)
    divides = all(heads % tensor == 0 for heads, _ in config.cache_shapes)
    return NamedSharding(mesh, PartitionSpec(None, "tensor" if divides else None))


@jax.jit
def _split(layers):
    return split_layers({"layers": layers})["layers"]
