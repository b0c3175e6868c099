"""What `launch.wise` does to models in hand: are they relatives, and the mixture of them.

No flags here, so that a test can use it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import lineage
from moejax.io.hf import function_of
from moejax.io.load import Loaded, find_source
from moejax.io.mixed import LinearSource, WholeSource, check_same_tensors, linear
from moejax.io.safetensors import SafetensorsFolder, TensorSource
from moejax.methods import soup
from moejax.methods.interpolate import (
    Deltas,
    check_same_tree,
    ema_weights,
    layer_number,
    stack_indices,
)
from moejax.models.config import ModelConfig
from moejax.models.families import by_name

_LINEAR = ("wise", "mean", "ema", "task")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How models are mixed; of which fields a method takes notice `launch.wise` says."""

    method: str
    deltas: Deltas = Deltas()
    decay: float = 0.9
    scale: float = 1.0
    density: float = 0.2
    seed: int = 0

    def __post_init__(self):
        if self.method in ("ties", "dare"):
            soup.check_density(self.density)
        rules = self.deltas
        if self.method != "wise" and (rules.patterns or rules.experts or rules.layers):
            raise InputError(f"deltas by place are of --method=wise, not of {self.method}")

    def weights(self, num: int, delta: float) -> tuple[float, ...]:
        """The weight of each model in a tensor, for the methods that are sums."""
        if self.method == "wise":
            return delta, 1 - delta
        if self.method == "mean":
            return (1 / num,) * num
        if self.method == "ema":
            return ema_weights(num, self.decay)
        return (1 - self.scale * (num - 1), *[self.scale] * (num - 1))

    def combine(self, name: str, arrays: list[np.ndarray]) -> np.ndarray:
        """One tensor of all models mixed, for the methods that need it whole."""
        if self.method == "slerp":
            return soup.slerp(arrays, self.deltas.delta)
        if self.method == "ties":
            return soup.ties(arrays, self.scale, self.density)
        return soup.dare(arrays, self.scale, self.density, self.seed, name)

    def args(self) -> dict[str, Any]:
        """What the lineage records."""
        used: dict[str, dict[str, Any]] = {
            "wise": {"deltas": dataclasses.asdict(self.deltas)},
            "slerp": {"delta": self.deltas.delta},
            "ema": {"decay": self.decay},
            "task": {"scale": self.scale},
            "ties": {"scale": self.scale, "density": self.density},
            "dare": {"scale": self.scale, "density": self.density, "seed": self.seed},
        }
        return {"method": self.method} | used.get(self.method, {})


def check_relatives(
    models: Sequence[Loaded], names: Sequence[str], allow_unrelated: bool
) -> list[str]:
    """Raises InputError unless models are of one kind and one run; returns what it cannot tell."""
    last, last_name = models[-1], names[-1]
    wanted = function_of(last.config)
    for model, name in zip(models[:-1], names[:-1], strict=True):
        for field, value in function_of(model.config).items():
            if value != wanted[field]:
                raise InputError(
                    f"{name} has {field}={value}, {last_name} has {wanted[field]}: only "
                    "checkpoints of one run can be mixed"
                )
        tokenizers = (model.tokenizer, last.tokenizer)
        if None not in tokenizers and _vocabulary(tokenizers[0]) != _vocabulary(tokenizers[1]):
            raise InputError(f"the tokenizers of {name} and {last_name} differ: no common ids")
    roots = [_root(model) for model in models]
    unknown = [name for name, root in zip(names, roots, strict=True) if root is None]
    known = {root: name for name, root in zip(names, roots, strict=True) if root is not None}
    if len(known) > 1 and not allow_unrelated:
        first, second, *_ = known.values()
        raise InputError(
            f"{first} and {second} come from different imports, so not of one run (lineage.json): "
            "pass --allow_unrelated to mix them all the same"
        )
    if unknown:
        return [f"{', '.join(unknown)}: no lineage, so nobody checked that all are of one run"]
    return []


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    return tokenizer.backend.get_vocab(with_added_tokens=True)


def _root(model: Loaded) -> str | None:
    """The hash of what its lineage began with; None where that is not known."""
    if not model.lineage or not model.lineage[0]["inputs"]:
        return None
    first = model.lineage[0]["inputs"][0]
    return first.get("xxh3") or first.get("sha256") or None  # lineages began with the latter


def input_hashes(
    models: Sequence[Loaded], names: Sequence[str], pool: Executor, *, whole: bool
) -> Callable[[], list[dict[str, str]]]:
    """What the lineage will say of the models, once what it gives is called, after the mixing.

    Weights that come from safetensors files part by part are hashed on their way; others, and
    `whole` models, by the pool beside the mixing.
    """

    def begin(model: Loaded, path: Path) -> Callable[[], dict[str, str]]:
        if not whole and isinstance(model.tensors, SafetensorsFolder):
            return functools.partial(lineage.input_of, path, model.tensors.hash_reads().of)
        return pool.submit(lineage.input_of, path).result

    begun = [begin(m, find_source(name)) for m, name in zip(models, names, strict=True)]
    return lambda: [done() | {"path": name} for name, done in zip(names, begun, strict=True)]


def mixed_model(
    models: Sequence[Loaded], names: Sequence[str], plan: Plan, *, whole: bool
) -> Loaded:
    """The mixture, with the config and tokenizer of the last model.

    whole: models are in memory, and so will the mixture be; else its tensors are mixed when they
    are read. Errors: InputError where tensors differ, or a rule fits nothing.
    """
    last = models[-1]
    config = last.config
    paths = list(tree.flatten(last.params))
    plan.deltas.check_fits(config, paths)
    if whole:
        for other in models[:-1]:
            check_same_tree(other.params, last.params)
        return dataclasses.replace(last, params=_mixed_tree(models, plan), tensors=None)
    sources: list[TensorSource] = []
    for model in models:
        assert model.tensors is not None
        sources.append(model.tensors)
    check_same_tensors(sources, names)
    table = by_name(config.family).name_table(config)
    weights = {weight.hf_name: weight for weight in table}

    def weights_of(name: str) -> tuple[float, ...]:
        weight = weights[name]
        layer = None if not weight.index else layer_number(weight.path, weight.index, config)
        delta = plan.deltas.of(weight.path, layer, weight.expert, config.num_layers)
        return plan.weights(len(models), delta)

    sums = plan.method in _LINEAR
    tensors = LinearSource(sources, weights_of) if sums else WholeSource(sources, plan.combine)
    return dataclasses.replace(last, tensors=tensors)


def _mixed_tree(models: Sequence[Loaded], plan: Plan) -> tree.Tree:
    """Leaf by leaf, and in a stack tensor by tensor, in numpy."""
    flats = [tree.flatten(model.params) for model in models]
    mixed = {}
    for path, leaf in flats[-1].items():
        out = np.empty(leaf.shape, leaf.dtype)
        for index in stack_indices(path, leaf.shape):
            parts = [np.asarray(flat[path][index]) for flat in flats]
            out[index] = _mixed_tensor(path, index, parts, plan, models[-1].config)
        mixed[path] = out
    return tree.unflatten(mixed)


def _mixed_tensor(
    path: str,
    index: tuple[int, ...],
    parts: list[np.ndarray],
    plan: Plan,
    config: ModelConfig,
) -> np.ndarray:
    dtype = parts[-1].dtype
    wide = np.promote_types(dtype, np.float32)
    if plan.method not in _LINEAR:
        name = "/".join([path, *map(str, index)])
        return plan.combine(name, [part.astype(wide, copy=False) for part in parts]).astype(dtype)
    expert = index[1] if len(index) > 1 else None
    layer = layer_number(path, index, config)
    weights = plan.weights(len(parts), plan.deltas.of(path, layer, expert, config.num_layers))
    used = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
    if len(used) == 1 and used[0][1] == 1:
        return used[0][0]
    return linear(*zip(*(used or [(parts[-1], 0.0)]), strict=True))
