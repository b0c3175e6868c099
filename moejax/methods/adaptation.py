"""Ways to adapt a model to a task, behind one face: what is trained, and how the model is run.

esft    the chosen experts (`moejax.methods.esft`)      lora    low-rank factors (`.lora`)
full    every parameter                                 frozen  nothing: the base, the control
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods import esft, lora
from moejax.methods.expert_config import ExpertConfig
from moejax.methods.lora import LoraConfig
from moejax.models.config import ModelConfig

METHODS = ("esft", "full", "lora", "frozen")


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What is trained of a model.

    trainable: float32 masters. frozen: what the loss only reads. assemble: (trainable, frozen) ->
    the tree that `forward` takes. finish: (trainable, the model's parameters) -> the whole model on
    the host, in their dtypes; leaves that were not trained are the same objects.
    """

    trainable: tree.Tree
    frozen: tree.Tree
    assemble: Callable[[tree.Tree, tree.Tree], tree.Tree]
    finish: Callable[[tree.Tree, tree.Tree], tree.Tree]


def adapt(
    method: str,
    params: tree.Tree,
    config: ModelConfig,
    *,
    chosen: ExpertConfig | None = None,
    low_rank: LoraConfig = LoraConfig(),
) -> Adaptation:
    """One of `METHODS` for a model; `params` may be arrays or traced. InputError for another name
    and for ESFT without experts."""
    if method == "esft":
        if chosen is None:
            raise InputError("method esft needs to know the experts: give an expert config")
        parts = esft.split_params(params, config, chosen)
        return Adaptation(*parts, esft.assemble, lambda t, p: esft.finish(t, p, config, chosen))
    if method == "lora":
        return Adaptation(
            lora.init_adapters(params, low_rank),
            params,
            lambda t, p: lora.attach(t, p, low_rank),
            lambda t, p: lora.merge(t, p, low_rank),
        )
    if method == "full":
        dtypes = jax.tree.map(lambda w: w.dtype, params)
        masters = jax.tree.map(lambda w: w.astype("float32"), params)
        return Adaptation(masters, {}, lambda t, _: _cast(t, dtypes), _as_before)
    if method == "frozen":
        return Adaptation({}, params, lambda _, p: p, lambda _, p: p)
    raise InputError(f"method {method!r} is unknown: use one of {', '.join(METHODS)}")


def _cast(params: tree.Tree, dtypes: tree.Tree) -> tree.Tree:
    return jax.tree.map(lambda w, dtype: w.astype(dtype), params, dtypes)


def _as_before(trained: tree.Tree, params: tree.Tree) -> Any:
    return jax.tree.map(lambda w, old: np.asarray(w).astype(old.dtype), trained, params)
