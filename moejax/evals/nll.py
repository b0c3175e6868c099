"""Negative log-likelihood of held-out answers, per example, on the same tokens for every model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from moejax.core import tree
from moejax.core.sharding import everywhere
from moejax.data.loader import fixed_batches
from moejax.data.packing import Packed
from moejax.evals.bootstrap import Interval, paired_ratio, ratio
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions
from moejax.train.loss import MAX_LOGIT_BYTES, example_nll


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
        return [_record(*row) for row in zip(self.ids, self.sums, self.counts, strict=True)]


def evaluate(
    params: tree.Tree,
    config: ModelConfig,
    packed: Packed,
    *,
    batch_size: int = 4,
    options: ForwardOptions = ForwardOptions(),
    max_logit_bytes: int = MAX_LOGIT_BYTES,
    progress: Callable[[int, int], None] | None = None,
    done: Iterable[dict[str, Any]] = (),
    on_records: Callable[[list[dict[str, Any]]], None] | None = None,
) -> NllResult:
    """Sums -log p(token | what came before it in its example) over each example's answer tokens.

    Args:
      packed: held-out rows; the loss mask says which tokens count.
      batch_size: rows at a time. max_logit_bytes: of the logits that exist at once, per device.
      progress: called with (batches done, batches in all).
      done: records of an earlier run over the same rows, as `on_records` got them: batches of which
        all are there are not computed again.
      on_records: called with the records of each batch (`NllResult.records`).
    """
    known = {record["id"]: record for record in done}
    num_segments = max(len(names) for names in packed.ids)
    if options.parallel is None:
        params = jax.device_put(params)  # once, and not for every batch
    num_batches = -(-len(packed.ids) // batch_size)
    records: list[dict[str, Any]] = []
    for number, batch in enumerate(fixed_batches(packed, batch_size)):
        names = packed.ids[number * batch_size : (number + 1) * batch_size]
        places = [(row, s, name) for row, ids in enumerate(names) for s, name in enumerate(ids)]
        if all(name in known for *_, name in places):
            new = [known[name] for *_, name in places]
        else:
            found = _example_nll(params, batch, config, num_segments, options, max_logit_bytes)
            found = jax.device_get(found)
            new = [_record(name, *(array[row, s] for array in found)) for row, s, name in places]
        records += new
        if on_records is not None:
            on_records(new)
        if progress is not None:
            progress(number + 1, num_batches)
    ids = tuple(record["id"] for record in records)
    sums, counts = (
        np.array([record[name] for record in records], np.float64)
        for name in ("nll_sum", "num_tokens")
    )
    return NllResult(ids, sums, counts, tokens_hash(packed))


def _record(name: str, nll: float, count: float) -> dict[str, Any]:
    return {"id": name, "nll_sum": float(nll), "num_tokens": int(count)}


def tokens_hash(packed: Packed) -> str:
    """What identifies the tokens that a model is judged by, their segments and their mask."""
    digest = hashlib.sha256()
    for array in (packed.tokens, packed.segment_ids, packed.loss_mask):
        digest.update(repr((array.shape, str(array.dtype))).encode() + array.tobytes())
    return digest.hexdigest()


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _example_nll(
    params, batch, config: ModelConfig, num_segments: int, options: ForwardOptions, memory: int
):
    found = example_nll(
        params, config, batch, num_segments=num_segments, options=options, max_logit_bytes=memory
    )
    return everywhere(found, options.mesh)
