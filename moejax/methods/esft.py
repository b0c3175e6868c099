"""Expert-specialised fine-tuning: only the chosen experts are trained (arXiv 2407.01906, 3.3).

`split_params` makes of a model's tree what is trained and what is not. What is trained are float32
masters of the chosen experts alone, stacked over their (layer, expert) pairs, and with them every
gradient and optimizer moment. `assemble` is the tree that the model is run with; in its backward
pass no product for another expert's weights is computed (`moejax.moe.tuned`). `finish` writes the
masters back; every other array is the one that came in.

    trainable   experts/<run>/w_gate [P, D, F] ...     P pairs of that run of layers, ascending
                <path>                                 shared experts or other modules, if asked for
    frozen      <path>                                 the rest of the model
                pairs/<run>/{slot_LM, ids_LM, place_P} where a pair's master is used; M is the
                                                       largest number of chosen experts in a layer

On a mesh every pair's matrices are split over all devices (`moejax.core.sharding`), whichever
layer or device the expert belongs to: the optimizer's work and state are even by construction. A
layer gathers its chosen experts in the stored dtype when it is run, and their gradients come back
summed and split (reduce-scatter).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods.expert_config import ExpertConfig
from moejax.models.config import ModelConfig
from moejax.models.params import abstract_params

EXPERTS = "layers/{run}/moe/experts"
SHARED = "layers/*/moe/shared/*"
ROUTED = "layers/*/moe/experts/*"


@dataclasses.dataclass(frozen=True)
class RunPairs:
    """The chosen experts of one run of layers, ascending.

    name: of the run. num_layers, num_experts: its L and E. layers: the model's numbers of its
    layers. rows, ids: int arrays [P], a pair's layer within the run and its expert.
    """

    name: str
    num_layers: int
    num_experts: int
    layers: tuple[int, ...]
    rows: np.ndarray
    ids: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Chosen experts per layer."""
        return np.bincount(self.rows, minlength=self.num_layers)

    def slots(self) -> dict[str, np.ndarray]:
        """slot_LM: a layer's pairs (P: none); ids_LM: their experts (E: none); place_P: inverse."""
        width = max(1, int(self.counts.max(initial=0)))
        slot = np.full((self.num_layers, width), len(self.rows), np.int32)
        ids = np.full((self.num_layers, width), self.num_experts, np.int32)
        place = np.zeros(len(self.rows), np.int32)
        used = [0] * self.num_layers
        for pair, (row, expert) in enumerate(zip(self.rows, self.ids, strict=True)):
            slot[row, used[row]], ids[row, used[row]] = pair, expert
            place[pair] = row * width + used[row]
            used[row] += 1
        return {"slot_LM": slot, "ids_LM": ids, "place_P": place}


def runs_of(config: ModelConfig, chosen: ExpertConfig) -> list[RunPairs]:
    """The chosen pairs by run; with shared experts XFT's expert 0 of every layer is one of them."""
    assert config.moe is not None
    found, first = [], 0
    for run in config.runs:
        layers = tuple(range(first, first + run.num_layers))
        first += run.num_layers
        if run.kind != "moe":
            continue
        extra = (0,) if chosen.shared_experts and config.moe.num_shared else ()
        pairs = [
            (row, e)
            for row, layer in enumerate(layers)
            for e in sorted({*extra, *chosen.experts.get(layer, ())})
        ]
        rows, ids = np.array(pairs, np.int32).reshape(-1, 2).T
        found.append(RunPairs(run.name, run.num_layers, config.moe.num_experts, layers, rows, ids))
    return found


def rest_paths(config: ModelConfig, chosen: ExpertConfig) -> list[str]:
    """Whole leaves that are trained too: shared networks, or all that is no expert."""

    def wanted(path: str) -> bool:
        if tree.matches(path, SHARED):
            return chosen.shared_experts
        return chosen.non_expert_modules and not tree.matches(path, ROUTED)

    return [path for path in tree.flatten(abstract_params(config)) if wanted(path)]


def split_params(
    params: tree.Tree,
    config: ModelConfig,
    chosen: ExpertConfig,
    master_dtype: Any = "float32",
) -> tuple[tree.Tree, tree.Tree]:
    """(trainable, frozen) as the module says. Inverse, up to rounding: `finish`.

    Raises InputError for experts that the model does not have, or nothing to train.
    """
    chosen.check_fits(config, "the expert config")
    flat = tree.flatten(params)
    experts, pairs = {}, {}
    for run in runs_of(config, chosen):
        if not len(run.rows):
            continue
        stacks = _stacks(flat, run.name)
        experts[run.name] = {
            name: _cast(stack[run.rows, run.ids], master_dtype) for name, stack in stacks.items()
        }
        pairs[run.name] = run.slots()
    rest = {path: _cast(flat[path], master_dtype) for path in rest_paths(config, chosen)}
    if not experts and not rest:
        raise InputError("the expert config names no expert and no other part: nothing to train")
    base = {path: leaf for path, leaf in flat.items() if path not in rest}
    trainable: dict[str, Any] = {"experts": experts} if experts else {}
    return {**trainable, **tree.unflatten(rest)}, {**tree.unflatten(base), "pairs": pairs}


def rest_of(trainable: tree.Tree) -> dict[str, Any]:
    """Path -> whole trained leaf, without the experts' masters."""
    return tree.flatten({name: part for name, part in trainable.items() if name != "experts"})


def assemble(trainable: tree.Tree, frozen: tree.Tree) -> tree.Tree:
    """The tree to run the model with: the base, with the masters where they belong.

    Masters are cast to the base's dtype, so that what is trained is what will be stored.
    """
    flat = tree.flatten({name: part for name, part in frozen.items() if name != "pairs"})
    dtype = jnp.result_type(*{leaf.dtype for path, leaf in flat.items() if "/experts/" in path})
    for path, leaf in rest_of(trainable).items():
        flat[path] = leaf.astype(dtype)
    for name, masters in trainable.get("experts", {}).items():
        where, parent = frozen["pairs"][name], EXPERTS.format(run=name)
        for leaf, master in masters.items():
            stored = master.astype(flat[f"{parent}/{leaf}"].dtype)
            flat[f"{parent}/tuned/{leaf}"] = _spread(stored, where["slot_LM"], where["place_P"])
        flat[f"{parent}/tuned/ids_M"] = where["ids_LM"]
    return tree.unflatten(flat)


def finish(
    trainable: tree.Tree, params: tree.Tree, config: ModelConfig, chosen: ExpertConfig
) -> tree.Tree:
    """The whole model with the trained parts in it, on the host, in the dtypes of `params`.

    params: what `split_params` was given. Leaves that nothing of was trained are the same objects.
    """
    flat = dict(tree.flatten(params))
    for path, leaf in rest_of(trainable).items():
        flat[path] = np.asarray(leaf).astype(flat[path].dtype)
    for run in runs_of(config, chosen):
        for name, master in trainable.get("experts", {}).get(run.name, {}).items():
            path = f"{EXPERTS.format(run=run.name)}/{name}"
            stack = np.array(flat[path])
            stack[run.rows, run.ids] = np.asarray(master).astype(stack.dtype)
            flat[path] = stack
    return tree.unflatten(flat)


@jax.custom_vjp
def _spread(master_P: jax.Array, slot_LM: jax.Array, place_P: jax.Array) -> jax.Array:
    """Masters as layers use them, [P, ...] -> [L, M, ...]; what fills up is never used."""
    return jnp.take(master_P, slot_LM, axis=0, mode="clip")


def _spread_forward(master_P, slot_LM, place_P):
    return _spread(master_P, slot_LM, place_P), (slot_LM.shape, place_P)


def _spread_backward(saved, d_LM):
    # A pair stands in one place only: its gradient is read there, where autodiff would add up.
    shape, place_P = saved
    flat = d_LM.reshape(shape[0] * shape[1], *d_LM.shape[2:])
    return jnp.take(flat, place_P, axis=0), None, None


_spread.defvjp(_spread_forward, _spread_backward)


def _stacks(flat: dict[str, Any], run: str) -> dict[str, Any]:
    prefix = EXPERTS.format(run=run) + "/"
    return {path.removeprefix(prefix): w for path, w in flat.items() if path.startswith(prefix)}


def _cast(array: Any, dtype: Any) -> Any:
    if isinstance(array, jax.Array):
        return array.astype(dtype)
    return np.array(array).astype(dtype)
