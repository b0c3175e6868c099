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
    if delta.base_sha256:
        check_hash(lineage.hash_params(params), delta, where)


def check_hash(found: str, delta: Delta, where: str) -> None:
    """`check_base` of a base whose hash is known; where either is not (""), nothing is said."""
    if found and delta.base_sha256 not in ("", found):
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
    gone); its layers may be stacked or, as decoding has them, apart. Beside it there are the
    deltas, and what the one in use has replaced. InputError for a delta of another base or an
    unknown name.
    """

    def __init__(self, params: tree.Tree, config: ModelConfig, base_sha256: str = ""):
        self._config, self._base = config, base_sha256
        params = jax.tree.map(jnp.asarray, params)
        runs = params["layers"]
        self._apart = {name for name, run in runs.items() if isinstance(run, tuple)}
        # Path -> a leaf; where layers are apart, a list of one per layer.
        self._flat: dict[str, Any] = dict(
            tree.flatten({name: part for name, part in params.items() if name != "layers"})
        )
        for name, run in runs.items():
            layers = [tree.flatten(layer) for layer in (run if name in self._apart else (run,))]
            for path in layers[0]:
                found = [layer[path] for layer in layers]
                whole = found if name in self._apart else found[0]
                self._flat[f"layers/{name}/{path}"] = whole
        self._deltas: dict[str, Delta] = {}
        self._replaced: Delta | None = None
        self.name: str | None = None

    @classmethod
    def of(cls, params: tree.Tree, config: ModelConfig, deltas: Mapping[str, Delta]) -> Adapters:
        """With these deltas, by name."""
        made = cls(params, config)
        for name, delta in deltas.items():
            made.add(name, delta)
        return made

    @property
    def params(self) -> tree.Tree:
        """The tree as it now is."""
        made = tree.unflatten({p: leaf for p, leaf in self._flat.items() if not _is_apart(leaf)})
        for name in self._apart:
            prefix = f"layers/{name}/"
            lists = {p: leaf for p, leaf in self._flat.items() if p.startswith(prefix)}
            paths = [path.removeprefix(prefix) for path in lists]
            made.setdefault("layers", {})[name] = tuple(
                tree.unflatten(dict(zip(paths, leaves, strict=True)))
                for leaves in zip(*lists.values(), strict=True)
            )
        return made

    @property
    def names(self) -> list[str]:
        """Of the deltas that are known, in order."""
        return sorted(self._deltas)

    def add(self, name: str, delta: Delta) -> None:
        """Makes a delta known; it is not put in yet."""
        delta.chosen.check_fits(self._config, f"adapter {name}")
        check_hash(self._base, delta, f"adapter {name}")
        self._deltas[name] = delta

    def use(self, name: str | None) -> tree.Tree:
        """Puts a delta in, None the base, and returns the tree."""
        if name is not None and name not in self._deltas:
            known = ", ".join(self.names) or "none"
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
            there, new = self._flat[path], delta.stacks[path]
            if not _is_apart(there):
                self._flat[path], stacks[path] = _swap(there, (run.rows, run.ids), new)
                continue
            replaced = []  # by layer, which is the order of the pairs
            for row in np.unique(run.rows):
                mine = run.rows == row
                there[row], old = _swap(there[row], (run.ids[mine],), new[mine])
                replaced.append(old)
            stacks[path] = jnp.concatenate(replaced)
        for path, leaf in delta.leaves.items():
            there = self._flat[path]
            leaves[path] = list(there) if _is_apart(there) else there
            if _is_apart(there):
                self._flat[path] = [_like(leaf[i], old) for i, old in enumerate(there)]
            else:
                self._flat[path] = _like(leaf, there)
        return Delta(delta.chosen, stacks, leaves)


def _is_apart(leaf: Any) -> bool:
    return isinstance(leaf, list)


def _like(new: Any, old: jax.Array) -> jax.Array:
    return jax.device_put(jnp.asarray(new, old.dtype), old.sharding)


def _swap(stack: jax.Array, place: tuple[np.ndarray, ...], new: Any) -> tuple[Any, Any]:
    """The stack with `new` at `place`, where it lies, and what was there; the stack is used up."""
    return _swapper(stack.sharding)(stack, place, new)


@functools.lru_cache(maxsize=64)
def _swapper(sharding: jax.sharding.Sharding):
    def swap(stack, place, new):
        old = stack[place]
        return stack.at[place].set(jnp.asarray(new, stack.dtype), unique_indices=True), old

    return jax.jit(swap, donate_argnums=0, out_shardings=(sharding, None))


def _fitting(found: Mapping[str, np.ndarray], path: str, shape: tuple[int, ...]) -> np.ndarray:
    if path not in found:
        raise InputError(f"the delta lacks {path}: it is of another model")
    if found[path].shape != shape:
        raise InputError(
            f"the delta has {path} as {list(found[path].shape)} and the model {list(shape)}: it is "
            "of another model"
        )
    return found[path]
