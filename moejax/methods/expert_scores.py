"""How much a task uses each expert: token selection ratio and average gate score, streamed.

ESFT, arXiv 2407.01906, section 3.2, with g = an expert's part of the router's softmax where the
token chose it, else 0 (never renormalised over the chosen ones), K experts per token:

    token  r_i = mean 1[g_i > 0] / K   (eq. 8)         gate  g_i = mean g_i   (eq. 7)

The paper takes the mean over sequences of each one's mean over tokens ("sequence"), its code the
mean over all tokens ("pooled"); here are both. Token ratios sum to one per layer, gate scores to
the mass that the chosen experts have. A sigmoid router's scores enter as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.mesh import TOKEN_AXES
from moejax.core.sharding import everywhere
from moejax.methods.expert_config import moe_layers
from moejax.methods.expert_selection import ExpertScores
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions
from moejax.moe.layer import Trace

P = PartitionSpec
AVERAGES = ("pooled", "sequence")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counters:
    """What was counted: chosen [.., L, J] int32 and tokens [..] int32; gates [.., L, J] float32.

    L layers of experts, J routed experts.
    """

    chosen: jax.Array
    gates: jax.Array
    tokens: jax.Array


@dataclasses.dataclass(frozen=True)
class Counted:
    """The counts of a data set.

    pooled: over all tokens. sequences: the same per sequence, [S, L, J] and [S], in the order they
    were read; every sum over them is the pooled one. top_k: experts per token, K.
    """

    pooled: Counters
    sequences: Counters
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: int

    def scores(self, average: str = "pooled") -> ExpertScores:
        """Both scores as float64 [L, J]."""
        if average not in AVERAGES:
            raise InputError(f"average {average!r} is none of {', '.join(AVERAGES)}")
        counters = self.pooled if average == "pooled" else self.sequences
        tokens = np.asarray(counters.tokens, np.float64)[..., None, None]
        values = {
            "token": np.asarray(counters.chosen, np.float64) / (tokens * self.top_k),
            "gate": np.asarray(counters.gates, np.float64) / tokens,
        }
        if average == "sequence":
            values = {name: value.mean(axis=0) for name, value in values.items()}
        return ExpertScores(self.layers, self.experts, values)

    def subset(self, rows: np.ndarray) -> Counted:
        """The same of some sequences."""
        part = jax.tree.map(lambda x: np.asarray(x)[rows], self.sequences)
        pooled = Counters(
            part.chosen.astype(np.int64).sum(axis=0),
            part.gates.astype(np.float64).sum(axis=0),
            part.tokens.astype(np.int64).sum(),
        )
        return dataclasses.replace(self, pooled=pooled, sequences=part)


def count(
    params: tree.Tree,
    config: ModelConfig,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    num_segments: int,
    options: ForwardOptions = ForwardOptions(),
    mesh: Mesh | None = None,
    on_tokens: Callable[[int, Trace, np.ndarray], Any] | None = None,
) -> Counted:
    """Counts the routing of packed batches; stops when they end.

    Args:
      params, config: any model with experts.
      batches: {"tokens", "segment_ids", "positions"}, each [B, T]; segment 0 is padding, which
        counts nowhere. Every other segment of a row is a sequence.
      num_segments: most sequences in a row.
      options: how to compute; with `options.parallel` parameters lie on its mesh already.
      mesh: B rows are split over its data, fsdp and expert axes, parameters are on every device;
        each device counts its own rows, and one sum over those axes ends it.
      on_tokens: called with (batch number, its trace [L, B, T, K], its segment ids), for files of
        single tokens.

    Errors: InputError for a dense model, expert choice, or rows that the devices do not divide.
    """
    if config.moe is None:
        raise InputError("the model is dense: there are no experts to score")
    moe = config.moe
    layers = moe_layers(config)
    experts = tuple(range(moe.num_shared, moe.num_experts))
    shape = (len(layers), len(experts))
    step = _counting_step(config, options, num_segments, mesh)
    parts = 1 if mesh is None else _parts(mesh)
    counters = Counters(
        jnp.zeros((parts, *shape), jnp.int32),
        jnp.zeros((parts, *shape), jnp.float32),
        jnp.zeros((parts,), jnp.int32),
    )
    if options.parallel is None:
        params = _placed(params, mesh)
    sequences = []
    for number, batch in enumerate(batches):
        if len(batch["tokens"]) % parts:
            raise InputError(
                f"a batch of {len(batch['tokens'])} rows does not divide by {parts} devices: give "
                f"a multiple of {parts}"
            )
        arrays = {name: batch[name] for name in ("tokens", "segment_ids", "positions")}
        counters, found, trace = step(params, counters, arrays)
        sequences.append(_real_sequences(jax.device_get(found)))
        if on_tokens is not None:
            on_tokens(number, jax.device_get(trace), batch["segment_ids"])
    if not sequences:
        raise InputError("no batch to score: give data")
    whole = jax.tree.map(lambda *arrays: np.concatenate(arrays), *sequences)
    pooled = jax.device_get(_sum_over_devices(counters, mesh))
    return Counted(pooled, whole, layers, experts, moe.routed_per_token)


def _counting_step(config: ModelConfig, options: ForwardOptions, num_segments: int, mesh):
    """(params, counters, batch) -> (counters, counts per row and segment, trace), jitted."""
    options = dataclasses.replace(options, trace_routing=True)
    assert config.moe is not None
    first, num_routed = config.moe.num_shared, config.moe.num_routed

    def per_segment(experts_TK, scores_TK, segments_T):
        """Counts [num_segments + 1, J] of one row and layer; row 0 is padding."""
        at = (segments_T[:, None], experts_TK - first)
        zeros = jnp.zeros((num_segments + 1, num_routed))
        chosen = zeros.astype(jnp.int32).at[at].add(1)
        return chosen, zeros.at[at].add(scores_TK)

    def step(params, counters, batch):
        segments_BT = batch["segment_ids"]
        output = transformer.forward(
            params,
            config,
            batch["tokens"],
            positions_BT=batch["positions"],
            segment_ids_BT=segments_BT,
            options=options,
        )
        assert output.stats is not None and output.stats.trace is not None
        trace = output.stats.trace
        each = jax.vmap(jax.vmap(per_segment), in_axes=(0, 0, None))
        chosen, gates = each(trace.experts_BTK, trace.scores_BTK, segments_BT)
        ids = jnp.arange(1, num_segments + 1)
        tokens_BS = jnp.sum(segments_BT[:, :, None] == ids, axis=1, dtype=jnp.int32)
        # [L, B, S, J] -> [B, S, L, J], without the padding's
        chosen, gates = (jnp.moveaxis(x[:, :, 1:], 0, 2) for x in (chosen, gates))
        found = Counters(chosen, gates, tokens_BS)
        more = jax.tree.map(lambda x: x.sum(axis=(0, 1))[None], found)
        result = jax.tree.map(jnp.add, counters, more), found, trace
        return everywhere(result, options.mesh)

    if mesh is None:
        return jax.jit(step)
    rows = P(TOKEN_AXES)
    out = (rows, rows, P(None, TOKEN_AXES))
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), rows, rows), out_specs=out, check_vma=False
    )
    return jax.jit(mapped)


def _sum_over_devices(counters: Counters, mesh: Mesh | None) -> Counters:
    """The one exchange: every device's counters added up."""
    if mesh is None:
        return jax.tree.map(lambda x: x[0], counters)

    def add(counters):
        return jax.tree.map(lambda x: jax.lax.psum(x[0], TOKEN_AXES), counters)

    return jax.jit(
        jax.shard_map(add, mesh=mesh, in_specs=P(TOKEN_AXES), out_specs=P(), check_vma=False)
    )(counters)


def _real_sequences(found: Counters) -> Counters:
    """[B, S, ...] without the segments that a row does not have: [sequences, ...]."""
    kept = found.tokens > 0
    return jax.tree.map(lambda x: x[kept], found)


def _parts(mesh: Mesh) -> int:
    return int(np.prod([mesh.shape[axis] for axis in TOKEN_AXES]))


def _placed(params: tree.Tree, mesh: Mesh | None) -> tree.Tree:
    return jax.device_put(params, None if mesh is None else NamedSharding(mesh, P()))
