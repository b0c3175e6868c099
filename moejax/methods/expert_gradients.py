"""A third signal of an expert's relevance: how strongly the task's loss pulls at its weights.

Not ESFT's; for comparison at equal budget. With G_b the gradient of batch b with respect to all
matrices of one expert, its score is sqrt(sum_b |G_b|^2), divided by the sum over its layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.models.config import ModelConfig

EXPERTS = "layers/*/moe/experts/*"


def gradient_scores(
    loss: Callable[[tree.Tree, Any], jax.Array],
    params: tree.Tree,
    config: ModelConfig,
    batches: Iterable[Any],
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Scores [L, J] of the routed experts, one per layer summing to one.

    loss: (params, batch) -> the task's mean loss. Needs the gradient of every expert at once: as
    much memory as the experts take.
    """
    assert config.moe is not None
    experts, rest = tree.split(params, EXPERTS)

    @jax.jit
    def squares(experts, rest, batch):
        grads = jax.grad(lambda e: loss(tree.join(e, rest), batch))(experts)
        runs: dict[str, Any] = {}
        for path, leaf in tree.flatten(grads).items():
            run, dims = path.split("/")[1], tuple(range(2, leaf.ndim))
            more = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=dims)
            runs[run] = runs.get(run, 0.0) + more
        return jnp.concatenate([runs[run] for run in sorted(runs, key=int)])

    experts, rest = jax.device_put((experts, rest))
    total_LE: Any = 0.0
    done = 0
    for done, batch in enumerate(batches, start=1):
        total_LE = total_LE + np.asarray(squares(experts, rest, batch), np.float64)
        progress(done)
    assert done, "no batch"
    size_LJ = np.sqrt(np.asarray(total_LE)[:, config.moe.num_shared :])
    return size_LJ / np.maximum(size_LJ.sum(axis=1, keepdims=True), 1e-30)
