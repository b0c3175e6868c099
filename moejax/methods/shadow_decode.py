"""ShadowLLM's decoding: weights laid out for it, and lists of what is kept put into them.

`lay_out` is done once. It takes one more copy of the layers that may be pruned (their projections
and feed-forward layers by rows, which replace the ones by columns), after which the tree it came
from can be dropped: what decodes is as large as the dense model.

`plan` chooses units from scores, as `shadow_mask.select` with a local budget does, and where rows
of a batch keep different ones makes their union: every unit that some row keeps is read once, and
each row's factors leave out what it does not keep itself, so its result is that of the row alone.
`Scored` chooses at every token instead, `Asking` in every layer at every token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods.shadow_mask import Kept, Mask, Sizes, num_kept
from moejax.methods.shadow_predictor import predict
from moejax.models.config import ModelConfig
from moejax.models.sparse import by_rows
from moejax.models.transformer import split_layers
from moejax.ops.deciding import best_of_rows

# Leaves of which the kept heads alone are read.
_OF_HEADS = tuple(f"attn/rows_{name}" for name in ("q", "o", "k_up", "v_up"))
# Unions are rounded up to so many equal parts of a layer, so that few programs are compiled.
UNION_STEPS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What one call computes: `Kept` lists [L - first, K] that all rows share, and their factors.

    heads_BLK, blocks_BLK: [B, L - first, K] float32, 1 where the row keeps it; None: all ones.
    """

    kept: Kept
    heads_BLK: jax.Array | None = None
    blocks_BLK: jax.Array | None = None

    @property
    def lengths(self) -> tuple[int, int]:
        """Heads and blocks that are read of a layer."""
        return self.kept.heads.shape[-1], self.kept.blocks.shape[-1]

    weights = ()  # of predictors, that every token reads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored:
    """One predictor decides at every token, by what layer 0's attention mixes there.

    weights: its parameters. keep_B2: int32 [B, 2], heads and blocks of a layer that each row keeps;
    None: one row, which keeps whole lists. lengths: of these, with room for what all rows keep.
    """

    weights: dict[str, Any]
    keep_B2: Any
    sizes: Sizes = dataclasses.field(metadata={"static": True})
    lengths: tuple[int, int] = dataclasses.field(metadata={"static": True})

    def plan(self, context_BE: jax.Array) -> Plan:
        """Of a step in which layer 0's heads mixed this."""
        scores, lists, factors = predict(self.weights, context_BE, self.sizes), [], []
        for part, scores_BLU in enumerate((scores.heads, scores.blocks)):
            best = functools.partial(best_of_rows, length=self.lengths[part])
            each_layer = jax.vmap(best, in_axes=(1, None), out_axes=(0, 1))
            keep_B = None if self.keep_B2 is None else self.keep_B2[:, part]
            kept, factor = each_layer(scores_BLU[:, self.sizes.first :], keep_B)
            lists.append(kept)
            factors.append(factor)
        return Plan(Kept(*lists), *factors)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asking:
    """Every layer decides at every token, by two predictors that read what enters it.

    weights: of each layer from `Sizes.first` on, {"heads": .., "neurons": ..}, each with w_1 and
      w_2 as `moejax.models.sparse` reads them. keep_B2, lengths: as of `Scored`.
    """

    weights: tuple[dict[str, Any], ...]
    keep_B2: Any
    lengths: tuple[int, int] = dataclasses.field(metadata={"static": True})


AnyPlan = Plan | Scored | Asking


def lay_out(params: tree.Tree, config: ModelConfig, sizes: Sizes) -> tree.Tree:
    """The tree as decoding with skipped parts reads it, layer by layer."""
    if not any(isinstance(run, tuple) for run in params["layers"].values()):
        params = split_layers(params)
    relaid = jax.jit(functools.partial(by_rows, num_units=sizes.heads, block=sizes.block))
    runs, number = {}, 0
    for run in config.runs:
        made = []
        for layer in params["layers"][run.name]:
            made.append(relaid(layer) if number >= sizes.first else layer)
            number += 1
        runs[run.name] = tuple(made)
    return params | {"layers": runs}


def with_plan(
    params: tree.Tree,
    config: ModelConfig,
    sizes: Sizes,
    plan: AnyPlan | None,
    context: Callable[[], jax.Array],
) -> tree.Tree:
    """A laid out tree whose next token is computed with the plan's units alone; None: everything.

    context: gives what layer 0's heads mix at this token, [B, E], where the plan asks for it. Of a
    reading of the model made for that, layer 0's attention alone is computed when jitted, and once:
    the reading with the plan has it too.
    """
    if plan is None:
        return params
    if isinstance(plan, Scored):
        plan = plan.plan(context())
    runs, at = {}, -sizes.first
    for run in config.runs:
        made = []
        for layer in params["layers"][run.name]:
            made.append(layer if at < 0 else _with_lists(layer, plan, at))
            at += 1
        runs[run.name] = tuple(made)
    return params | {"layers": runs}


def _with_lists(layer: tree.Tree, plan: Plan | Asking, at: int) -> tree.Tree:
    made = dict(layer)
    feed = "mlp" if "mlp" in layer else "moe"
    if isinstance(plan, Asking):
        asked = plan.weights[at]["heads"], plan.weights[at]["neurons"]
        for at_part, (part, ask) in enumerate(zip(("attn", feed), asked, strict=True)):
            if plan.keep_B2 is not None:
                ask = ask | {"keep_B": plan.keep_B2[:, at_part]}
            made[part] = layer[part] | {"ask": ask, "kept": jnp.arange(plan.lengths[at_part])}
        return made
    parts = (("attn", plan.kept.heads, plan.heads_BLK),)
    for part, kept, weight in (*parts, (feed, plan.kept.blocks, plan.blocks_BLK)):
        lists = {"kept": kept[at]}
        if weight is not None:
            lists["weight"] = weight[:, at]
        made[part] = layer[part] | lists
    return made


@functools.partial(jax.jit, static_argnums=(1, 2))
def kept_by_scores(scores: Mask, sizes: Sizes, sparsity: tuple[float, float]) -> Kept:
    """The lists of the best units, [..., L - first, K]: `kept_of(select(...))` on the device."""

    def part(values: jax.Array, share: float) -> jax.Array:
        later = values[..., sizes.first :, :]
        best = jax.lax.top_k(later, num_kept(later.shape[-1], share))[1]
        return jnp.sort(best, axis=-1).astype(jnp.int32)

    return Kept(part(scores.heads, sparsity[0]), part(scores.blocks, sparsity[1]))


def plan_of(kept_B: Kept, sizes: Sizes) -> Plan:
    """The plan of a batch from each row's lists [B, L - first, K]: one row's own, else `union`."""
    if kept_B.heads.shape[0] == 1:
        return Plan(Kept(kept_B.heads[0], kept_B.blocks[0]))
    has_B = Mask(*(kept_units(k, n) for k, n in _parts(kept_B, sizes)))
    return union(has_B, lengths(sizes))


def kept_units(kept_LK: Any, num_units: int) -> np.ndarray:
    """Lists [..., K] as bool [..., units]."""
    kept_LK = np.asarray(kept_LK)
    has_LU = np.zeros((*kept_LK.shape[:-1], num_units), bool)
    np.put_along_axis(has_LU, kept_LK, True, axis=-1)
    return has_LU


def union(has_B: Mask, allowed: Sequence[tuple[int, int]]) -> Plan:
    """The plan of rows that keep different units, each under its own factors.

    has_B: bool [B, L - first, units] of numpy. allowed: `lengths` of the lists, of which the first
    is taken in which what any row keeps has room in every layer, so that few programs are compiled.
    Layers with fewer repeat a unit of theirs with factor 0.
    """
    any_B = [np.any(has, axis=0) for has in (has_B.heads, has_B.blocks)]
    most = [int(np.sum(any_LU, axis=-1).max()) for any_LU in any_B]
    length = next(pair for pair in allowed if pair[0] >= most[0] and pair[1] >= most[1])
    heads = _union(np.asarray(has_B.heads), any_B[0], length[0])
    blocks = _union(np.asarray(has_B.blocks), any_B[1], length[1])
    return Plan(Kept(heads[0], blocks[0]), heads[1], blocks[1])


def lengths(sizes: Sizes, sparsity: tuple[float, float] | None = None) -> list[tuple[int, int]]:
    """What lists of (heads, blocks) may be as long as, ascending: UNION_STEPS parts of all units.

    And what one row of this sparsity keeps.
    """
    units = sizes.heads, sizes.blocks
    found = {
        tuple(-(-n * step // UNION_STEPS) for n in units) for step in range(1, UNION_STEPS + 1)
    }
    if sparsity is not None:
        found.add(sizes.kept(sparsity))
    return sorted(((heads, blocks) for heads, blocks in found), key=lambda pair: (pair[1], pair[0]))


def empty_lists(pair: tuple[int, int], num_rows: int, sizes: Sizes) -> Plan:
    """A plan of a union's shapes that keeps nothing."""
    num_layers = sizes.num_layers - sizes.first
    kept = (jnp.zeros((num_layers, n), jnp.int32) for n in pair)
    return Plan(Kept(*kept), *(jnp.zeros((num_rows, num_layers, n)) for n in pair))


def _parts(kept: Kept, sizes: Sizes):
    return (kept.heads, sizes.heads), (kept.blocks, sizes.blocks)


def _union(has_BLU: np.ndarray, any_LU: Any, length: int) -> tuple[jax.Array, jax.Array]:
    """The lists [L, K] and the factors [B, L, K]."""
    if length == any_LU.shape[-1]:  # all units, in order
        any_LU = np.ones_like(any_LU)
    lists = np.zeros((any_LU.shape[0], length), np.int32)
    factors = np.zeros((has_BLU.shape[0], *lists.shape), np.float32)
    for at, any_U in enumerate(any_LU):
        found = np.flatnonzero(any_U)
        lists[at] = found[-1] if len(found) else 0
        lists[at, : len(found)] = found
        factors[:, at, : len(found)] = has_BLU[:, at, found]
    return jnp.asarray(lists), jnp.asarray(factors)


def check_plan(config: ModelConfig, sizes: Sizes) -> None:
    """InputError for a model whose decoding cannot skip anything of these sizes."""
    if sizes.first >= config.num_layers:
        raise InputError(f"no layer is left to prune of {config.num_layers}")


def num_read_bytes(
    params: tree.Tree, config: ModelConfig, plan: AnyPlan | None, sizes: Sizes
) -> int:
    """Bytes of weights that one token of one row reads, of a laid out or plain split tree.

    With those of predictors that it asks. Embedding tables count their one row; a tied head reads
    the table. Of experts those of one token count, and at most the kept blocks.
    """
    flat = tree.flatten({k: v for k, v in params.items() if k not in ("layers", "embed")})
    total: float = sum(_bytes(w) for w in flat.values())
    for name, w in params["embed"].items():
        looked_up = name == "positions" or (name == "tokens" and not config.tie_embeddings)
        total += _bytes(w) // w.shape[0] if looked_up else _bytes(w)
    if plan is not None:
        total += sum(_bytes(w) for w in jax.tree.leaves(plan.weights))
    number = -sizes.first
    for run in config.runs:
        for layer in params["layers"][run.name]:
            skips = plan is not None and number >= 0
            heads = plan.lengths[0] / sizes.heads if plan and skips else 1.0
            blocks = plan.lengths[1] / sizes.blocks if plan and skips else 1.0
            for path, w in tree.flatten(layer).items():
                share = 1.0
                if path in _OF_HEADS:
                    share = heads
                elif "rows_" in path and not path.startswith("attn/"):
                    share = blocks
                if config.moe is not None and path.startswith("moe/experts/"):
                    share = min(share, config.moe.top_k / config.moe.num_experts)
                total += _bytes(w) * share
            number += 1
    return round(total)


def _bytes(w: Any) -> int:
    return int(np.prod(w.shape)) * jnp.dtype(w.dtype).itemsize
