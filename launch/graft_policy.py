"""Rows that the student writes itself, with the source's states of them (GKD, arXiv 2306.13649)."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from launch.graft_loss import adapters_in, target_of
from launch.graft_setup import Setup, states_of
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.cache import init_cache
from moejax.models.transformer import forward, unembed


def on_policy(setup: Setup, rows, frozen: tree.Tree):
    """(step, parameters) -> rows: a share of the steps continues the rows' first tokens.

    The student draws at temperature 1 from the whole vocabulary; only what it wrote is learned.
    InputError for a share outside [0, 1], or prompts that leave no room.
    """
    d = setup.config.distill
    if not 0 <= d.on_policy <= 1:
        raise InputError(f"distill.on_policy={d.on_policy} must lie between 0 and 1")
    length = d.length or setup.config.data.target_len
    if not 1 <= d.prompt < length <= setup.config.data.target_len:
        raise InputError(
            f"distill.prompt={d.prompt} must be below the row's {length} tokens, and those at most "
            f"data.target_len={setup.config.data.target_len}"
        )
    source = frozen["source"]

    def batch(step: int, params: tree.Tree) -> Mapping[str, np.ndarray]:
        given = rows(step)
        rng = np.random.default_rng([setup.config.train.seed, 17, step])
        if rng.random() >= d.on_policy:
            return given
        key = jax.random.key(int(rng.integers(2**31)))
        prompt = jnp.asarray(given["tokens"][:, : d.prompt])
        held = {n: frozen[n] for n in frozen if n not in ("source", "source_head")}
        ids = np.asarray(_written(_Static(setup, length), params, held, prompt, key))
        return written_rows(setup, given, ids, source)

    return batch


def written_rows(setup: Setup, like, ids_BT: np.ndarray, source: tree.Tree):
    """Rows of ids [B, length], shaped as those of the data; the source reads them now."""
    length = ids_BT.shape[1]
    rows = {name: np.zeros_like(value) for name, value in like.items()}
    rows["positions"] = like["positions"]
    rows["tokens"][:, :length] = ids_BT
    rows["segment_ids"][:, :length] = 1
    rows["loss_mask"][:, setup.config.distill.prompt : length] = True
    rows["limits"][:, :length] = np.arange(1, length + 1)
    if "states" in rows:
        rows["states"][:, :length] = np.asarray(states_of(setup, source, jnp.asarray(ids_BT)))
    else:
        rows["source_tokens"][:, :length] = ids_BT
    return rows


class _Static:
    """A setup and a length as one static argument, equal where both are."""

    def __init__(self, setup: Setup, length: int):
        self.setup, self.length = setup, length

    def __hash__(self) -> int:
        return hash((id(self.setup), self.length))

    def __eq__(self, other) -> bool:
        return (id(self.setup), self.length) == (id(other.setup), other.length)


@functools.partial(jax.jit, static_argnums=0)
def _written(static: _Static, trainable, frozen, prompt_BP, key) -> jax.Array:
    """[B, length]: the prompts, continued by the student."""
    setup = static.setup
    params, config = target_of(setup, trainable, frozen), setup.target.config
    inserted = adapters_in(setup, trainable)
    num, prompt = prompt_BP.shape
    cache = init_cache(config, jnp.zeros(num, jnp.int32), static.length)

    def read(tokens_BT, cache):
        output = forward(
            params, config, tokens_BT, cache=cache, inserted=inserted, options=setup.options
        )
        return unembed(params, config, output.hidden_BTD[:, -1]), output.cache

    def step(carry, key):
        logits_BV, cache = carry
        drawn_B = jax.random.categorical(key, logits_BV).astype(prompt_BP.dtype)
        return read(drawn_B[:, None], cache), drawn_B

    keys = jax.random.split(key, static.length - prompt)
    _, drawn_TB = jax.lax.scan(step, read(prompt_BP, cache), keys)
    return jnp.concatenate([prompt_BP, drawn_TB.T], axis=1)
