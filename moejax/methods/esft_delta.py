"""A task's delta: the trained experts, to be put into a base and taken out again, bit for bit.

extract(insert(p, d)) == d, and insert(insert(p, d), extract(p)) == p: a delta replaces weights, it
adds nothing to them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import lineage
from moejax.methods.esft import EXPERTS, RunPairs, rest_of, rest_paths, runs_of
from moejax.methods.expert_config import ExpertConfig
from moejax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Delta:
    """Weights that take the place of a base's.

    Attributes:
      chosen: the experts.
      stacks: path of an expert stack -> the chosen pairs' matrices [P, ...], ascending.
      leaves: path -> a whole leaf (shared experts, other modules).
      base_sha256: `moejax.io.lineage.hash_params` of the base it was trained from; "" if unknown,
        as of the reference's adapters.
    """

    chosen: ExpertConfig
    stacks: Mapping[str, np.ndarray]
    leaves: Mapping[str, np.ndarray]
    base_sha256: str = ""

    @property
    def num_bytes(self) -> int:
        """What the weights take."""
        return sum(w.nbytes for w in (*self.stacks.values(), *self.leaves.values()))


def extract(params: tree.Tree, config: ModelConfig, chosen: ExpertConfig) -> Delta:
    """What a model has where `chosen` says. Inverse: `insert`."""
    chosen.check_fits(config, "the expert config")
    flat = tree.flatten(params)
    stacks = {
        path: np.asarray(flat[path][run.rows, run.ids])
        for path, run in stack_paths(flat, config, chosen).items()
    }
    leaves = {path: np.asarray(flat[path]) for path in rest_paths(config, chosen)}
    return Delta(chosen, stacks, leaves)


def insert(params: tree.Tree, config: ModelConfig, delta: Delta) -> tree.Tree:
    """The model with a delta's weights in it, on the host; `params` stays as it is.

    Leaves that the delta does not touch are the same objects. Raises InputError unless the delta
    fits the model; `check_base` compares the base's hash.
    """
    delta.chosen.check_fits(config, "the delta")
    flat = dict(tree.flatten(params))
    for path, run in stack_paths(flat, config, delta.chosen).items():
        stack = np.array(flat[path])
        stack[run.rows, run.ids] = _fitting(delta.stacks, path, (len(run.rows), *stack.shape[2:]))
        flat[path] = stack
    for path in rest_paths(config, delta.chosen):
        leaf = flat[path]
        flat[path] = _fitting(delta.leaves, path, leaf.shape).astype(leaf.dtype)
    return tree.unflatten(flat)


def of_trained(
    trainable: tree.Tree, params: tree.Tree, config: ModelConfig, chosen: ExpertConfig
) -> Delta:
    """The delta of a run of `moejax.methods.esft`, in the base's dtypes; `params` is the base."""
    flat = tree.flatten(params)
    stacks = {}
    for path, run in stack_paths(flat, config, chosen).items():
        master = trainable["experts"][run.name][path.rsplit("/", 1)[1]]
        stacks[path] = np.asarray(master).astype(flat[path].dtype)
    leaves = {
        path: np.asarray(leaf).astype(flat[path].dtype) for path, leaf in rest_of(trainable).items()
    }
    return Delta(chosen, stacks, leaves, lineage.hash_params(params))


def check_base(params: tree.Tree, delta: Delta, where: str) -> None:
    """Raises InputError unless `params` is what the delta was trained from, where that is known."""
    if not delta.base_sha256:
        return
    found = lineage.hash_params(params)
    if found != delta.base_sha256:
        raise InputError(
            f"{where} was trained from a base with sha256 {delta.base_sha256[:12]} and this one "
            f"has {found[:12]}: give the base it was trained from"
        )


def stack_paths(
    flat: Mapping[str, Any], config: ModelConfig, chosen: ExpertConfig
) -> dict[str, RunPairs]:
    """Every expert stack that something of is chosen -> the pairs."""
    found: dict[str, RunPairs] = {}
    for run in runs_of(config, chosen):
        prefix = EXPERTS.format(run=run.name) + "/"
        if len(run.rows):
            found |= {path: run for path in flat if path.startswith(prefix)}
    return found


class Adapters:
    """Several deltas on one base, in one process: one at a time in place, with no second model.

    `params` is the model on the device, changed in place by `use` (arrays taken from it before are
    gone). Beside it there are the deltas, and what the one in use has replaced. InputError for a
    delta of another base or an unknown name.
    """

    def __init__(self, params: tree.Tree, config: ModelConfig, base_sha256: str = ""):
        self._config, self._base = config, base_sha256
        self._flat = dict(tree.flatten(jax.tree.map(jnp.asarray, params)))
        self._deltas: dict[str, Delta] = {}
        self._replaced: Delta | None = None
        self.name: str | None = None

    @property
    def params(self) -> tree.Tree:
        """The tree as it now is."""
        return tree.unflatten(self._flat)

    def add(self, name: str, delta: Delta) -> None:
        """Makes a delta known; it is not put in yet."""
        delta.chosen.check_fits(self._config, f"adapter {name}")
        if self._base and delta.base_sha256 and self._base != delta.base_sha256:
            raise InputError(
                f"adapter {name} was trained from a base with sha256 {delta.base_sha256[:12]} and "
                f"this one has {self._base[:12]}: it is of another base"
            )
        self._deltas[name] = delta

    def use(self, name: str | None) -> tree.Tree:
        """Puts a delta in, None the base, and returns the tree."""
        if name is not None and name not in self._deltas:
            known = ", ".join(sorted(self._deltas)) or "none"
            raise InputError(f"no adapter {name!r}: there are {known}")
        if name != self.name:
            if self._replaced is not None:
                self._exchange(self._replaced)
            self._replaced = None if name is None else self._exchange(self._deltas[name])
            self.name = name
        return self.params

    def _exchange(self, delta: Delta) -> Delta:
        """Puts weights in and returns what was there."""
        stacks: dict[str, Any] = {}
        leaves: dict[str, Any] = {}
        for path, run in stack_paths(self._flat, self._config, delta.chosen).items():
            self._flat[path], stacks[path] = _swap(
                self._flat[path], run.rows, run.ids, delta.stacks[path]
            )
        for path, leaf in delta.leaves.items():
            leaves[path] = self._flat[path]
            self._flat[path] = jnp.asarray(leaf, self._flat[path].dtype)
        return Delta(delta.chosen, stacks, leaves)


@functools.partial(jax.jit, donate_argnums=0)
def _swap(stack: jax.Array, rows, ids, new) -> tuple[jax.Array, jax.Array]:
    old = stack[rows, ids]
    return stack.at[rows, ids].set(jnp.asarray(new, stack.dtype), unique_indices=True), old


def _fitting(found: Mapping[str, np.ndarray], path: str, shape: tuple[int, ...]) -> np.ndarray:
    if path not in found:
        raise InputError(f"the delta lacks {path}: it is of another model")
    if found[path].shape != shape:
        raise InputError(
            f"the delta has {path} as {list(found[path].shape)} and the model {list(shape)}: it is "
            "of another model"
        )
    return found[path]
