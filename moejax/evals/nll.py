"""Negative log-likelihood of held-out answers, per example, on the same tokens for every model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moejax.core import tree
from moejax.data.loader import fixed_batches
from moejax.data.packing import Packed
from moejax.evals.bootstrap import Interval, paired_ratio, ratio
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions
from moejax.train.loss import example_nll


@dataclasses.dataclass(frozen=True)
class NllResult:
    """Example i: `sums[i]` nats over `counts[i]` answer tokens; `tokens` hashes what was read."""

    ids: tuple[str, ...]
    sums: np.ndarray
    counts: np.ndarray
    tokens: str

    @property
    def num_tokens(self) -> int:
        """Answer tokens over all examples."""
        return int(self.counts.sum())

    def interval(self, seed: int = 0) -> Interval:
        """Nats per answer token, sum(sums) / sum(counts), with its bootstrap interval."""
        return ratio(self.sums, self.counts, seed=seed)

    def minus(self, other: NllResult, seed: int = 0) -> Interval:
        """The paired difference in nats per token; ValueError unless both read the same tokens."""
        if self.tokens != other.tokens or self.ids != other.ids:
            raise ValueError(
                f"the models read different tokens, of {len(self.ids)} and {len(other.ids)} "
                "examples: evaluate both on one packed set"
            )
        return paired_ratio(self.sums, other.sums, self.counts, seed=seed)

    def records(self) -> list[dict[str, Any]]:
        """One plain record per example."""
        rows = zip(self.ids, self.sums.tolist(), self.counts.tolist(), strict=True)
        return [{"id": name, "nll_sum": nll, "num_tokens": int(count)} for name, nll, count in rows]


def evaluate(
    params: tree.Tree,
    config: ModelConfig,
    packed: Packed,
    *,
    batch_size: int = 4,
    options: ForwardOptions = ForwardOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> NllResult:
    """Sums -log p(token | what came before it in its example) over each example's answer tokens.

    Args:
      packed: held-out rows; the loss mask says which tokens count.
      progress: called with (batches done, batches in all).
    """
    num_segments = max(len(names) for names in packed.ids)
    if options.parallel is None:
        params = jax.device_put(params)  # once, and not for every batch
    num_batches = -(-len(packed.ids) // batch_size)
    parts = []
    for done, batch in enumerate(fixed_batches(packed, batch_size), 1):
        parts.append(jax.device_get(_example_nll(params, batch, config, num_segments, options)))
        if progress is not None:
            progress(done, num_batches)
    sums_RS = np.concatenate([sums for sums, _ in parts]).astype(np.float64)
    counts_RS = np.concatenate([counts for _, counts in parts]).astype(np.float64)
    places = [(row, s) for row, names in enumerate(packed.ids) for s in range(len(names))]
    rows, columns = (np.array(index) for index in zip(*places, strict=True))
    ids = tuple(name for names in packed.ids for name in names)
    return NllResult(ids, sums_RS[rows, columns], counts_RS[rows, columns], tokens_hash(packed))


def tokens_hash(packed: Packed) -> str:
    """What identifies the tokens that a model is judged by, their segments and their mask."""
    digest = hashlib.sha256()
    for array in (packed.tokens, packed.segment_ids, packed.loss_mask):
        digest.update(repr((array.shape, str(array.dtype))).encode() + array.tobytes())
    return digest.hexdigest()


@functools.partial(jax.jit, static_argnames=("config", "num_segments", "options"))
def _example_nll(params, batch, config: ModelConfig, num_segments: int, options: ForwardOptions):
    found = example_nll(params, config, batch, num_segments=num_segments, options=options)
    if options.parallel is None:
        return found
    everywhere = NamedSharding(options.parallel.mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(found, everywhere)
