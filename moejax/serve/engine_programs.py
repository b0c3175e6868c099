"""The three programs that an engine runs on the devices: read a prompt, draw tokens, copy pages.

Only the pool of pages stays on the devices, updated in place. What belongs to a row is a few
numbers, which every call brings along: rows then come and go without a program of their own, and
the shapes depend on the number of slots and pages only.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moejax.core import tree
from moejax.methods import shadow_decode
from moejax.methods.shadow_mask import Sizes
from moejax.models.cache import PagedCache
from moejax.models.config import ModelConfig
from moejax.models.inserted import Inserted
from moejax.models.transformer import ForwardOptions, forward, unembed
from moejax.serve.sampling import SamplingRows, sample

Pool = tuple[dict[str, tuple[jax.Array, ...]], dict[str, tuple[jax.Array, ...]]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the programs are specialised on, shapes aside.

    Attributes:
      config, options: the model, and how to compute.
      num_steps: most tokens per row that one call of `decode` draws.
      num_top: most likely tokens reported where log-probabilities are wanted; None: never wanted.
      place: how pages lie on a mesh; None on one device.
      sizes: of the lists of heads and neurons that `decode` computes alone; None: it takes none.
      keeps_logits: `Drawn` has those of every token.
    """

    config: ModelConfig
    options: ForwardOptions
    num_steps: int
    num_top: int | None = None
    place: NamedSharding | None = None
    sizes: Sizes | None = None
    keeps_logits: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What is to be known of every slot's row.

    last_B: the newest token, not yet in the cache; count_B: tokens drawn so far, limit_B: at most;
    finished_B: nothing is drawn (nobody is there, or it has ended); seed_B and index_B make its
    random key; stop_ids_BZ: ids that end it, -1 for none; wants_B: log-probabilities.
    """

    pages_BP: Any
    length_B: Any
    rope_length_B: Any
    last_B: Any
    count_B: Any
    limit_B: Any
    finished_B: Any
    seed_B: Any
    index_B: Any
    stop_ids_BZ: Any
    wants_B: Any
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """ids_BN, -1 where nothing was drawn; its ln p, and the most likely tokens, where wanted.

    context_BE: what layer 0's heads mixed at the newest token read, where `Plan.sizes` are given;
    logits_BNV: with `Plan.keeps_logits`.
    """

    ids_BN: Any
    log_probs_BN: Any
    top_ids_BNK: Any
    top_log_probs_BNK: Any
    context_BE: Any = None
    logits_BNV: Any = None


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(plan: Plan, params: tree.Tree, pool: Pool, tokens_BT, rows) -> Pool:
    """Keeps the keys and values of one chunk of prompts.

    rows: (pages_BP, length_B before it, valid_B, rope_length_B).
    """
    return _read(plan, params, pool, tokens_BT, rows)[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def reread(plan: Plan, params: tree.Tree, pool: Pool, tokens_BT, rows) -> tuple[Pool, jax.Array]:
    """`prefill` over what was there, with every head and neuron, and the logits [B, T, V]."""
    pool, hidden_BTD = _read(plan, params, pool, tokens_BT, rows)
    return pool, unembed(params, plan.config, hidden_BTD)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def copy_pages(plan: Plan, pool: Pool, sources_Z, targets_Z) -> Pool:
    """Copies pages; those with a target that does not exist are left out."""

    def copy(pages_AGSC):
        return pages_AGSC.at[targets_Z].set(pages_AGSC[sources_Z], mode="drop")

    return _placed(plan, jax.tree.map(copy, pool))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    plan: Plan,
    params: tree.Tree,
    pool: Pool,
    rows: Rows,
    num_steps,
    most_ended,
    lists: shadow_decode.AnyPlan | None = None,
) -> tuple[Pool, Drawn]:
    """Draws up to `num_steps` tokens for every row that is not finished.

    Stops when all rows are, and before that as soon as `most_ended` more of them are, so that their
    slots can be filled again. lists: what is computed, of parameters laid out for that
    (`plan.sizes`).
    """
    num_rows = rows.last_B.shape[0]
    rows = jax.tree.map(jnp.asarray, rows)
    keys_B = jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(
        rows.seed_B, rows.index_B
    )
    num_top = plan.num_top or 0
    shape = (num_rows, plan.num_steps)
    drawn = Drawn(
        jnp.full(shape, -1, jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, num_top), jnp.int32),
        jnp.zeros((*shape, num_top), jnp.float32),
        None if plan.sizes is None else jnp.zeros((num_rows, _context_size(plan.config))),
        jnp.zeros((*shape, plan.config.vocab_size)) if plan.keeps_logits else None,
    )
    num_finished = jnp.sum(rows.finished_B)

    def unfinished(carry):
        _, rows, _, step = carry
        num_ended = jnp.sum(rows.finished_B) - num_finished
        return (step < num_steps) & ~jnp.all(rows.finished_B) & (num_ended < most_ended)

    def draw(carry):
        return _step(plan, params, lists, keys_B, carry)

    pool, _, drawn, _ = jax.lax.while_loop(unfinished, draw, (pool, rows, drawn, 0))
    if plan.place is not None:
        whole = NamedSharding(plan.place.mesh, PartitionSpec())
        drawn = jax.lax.with_sharding_constraint(drawn, whole)
    return _placed(plan, pool), drawn


def seeing(contexts: list[jax.Array]) -> Inserted:
    """Notes what each layer's heads mixed, [B, T, H, C], the first one's first; of split layers."""

    def heads(_, x_BTHC):
        contexts.append(x_BTHC)
        return x_BTHC, None

    return Inserted(heads=heads)


# -- inside ----------------------------------------------------------------------------------------


def _read(plan: Plan, params: tree.Tree, pool: Pool, tokens_BT, rows) -> tuple[Pool, jax.Array]:
    cache = PagedCache(*pool, *rows)
    out = forward(params, plan.config, tokens_BT, cache=cache, options=plan.options)
    assert isinstance(out.cache, PagedCache)
    return _placed(plan, (out.cache.k, out.cache.v)), out.hidden_BTD


def _context_size(config: ModelConfig) -> int:
    return config.num_heads * (config.head_size if config.mla is None else config.mla.v_size)


def _step(plan: Plan, params, lists: shadow_decode.AnyPlan | None, keys_B, carry):
    """Reads every row's newest token and draws the one that follows it."""
    pool, rows, drawn, step = carry
    active_B = ~rows.finished_B
    valid_B = active_B.astype(jnp.int32)
    k, v = pool
    cache = PagedCache(k, v, rows.pages_BP, rows.length_B, valid_B, rows.rope_length_B)

    def read(used: tree.Tree) -> tuple[Any, Any]:
        """What `forward` gives, and what layer 0's heads mixed, [B, E], of laid out parameters."""
        contexts: list[jax.Array] = []
        inserted = None if plan.sizes is None else seeing(contexts)
        tokens_B1, options = rows.last_B[:, None], plan.options
        out = forward(
            used, plan.config, tokens_B1, cache=cache, options=options, inserted=inserted
        )
        return out, contexts[0].reshape(len(tokens_B1), -1) if contexts else None

    used = params
    if plan.sizes is not None:
        used = shadow_decode.with_plan(
            params, plan.config, plan.sizes, lists, lambda: read(params)[1]
        )
    out, context_BE = read(used)
    logits_BV = unembed(params, plan.config, out.hidden_BTD[:, 0])
    step_keys_B = jax.vmap(jax.random.fold_in)(keys_B, rows.count_B)
    ids_B = sample(logits_BV, step_keys_B, rows.sampling)
    drawn = _write(plan, drawn, step, logits_BV, jnp.where(active_B, ids_B, -1), rows.wants_B)
    if context_BE is not None:
        drawn = dataclasses.replace(drawn, context_BE=context_BE.astype(jnp.float32))
    stopped_B = jnp.any(ids_B[:, None] == rows.stop_ids_BZ, axis=-1)
    count_B = rows.count_B + valid_B
    rows = dataclasses.replace(
        rows,
        length_B=out.cache.length_B,
        last_B=jnp.where(active_B, ids_B, rows.last_B),
        count_B=count_B,
        finished_B=rows.finished_B | stopped_B | (count_B >= rows.limit_B),
    )
    return (out.cache.k, out.cache.v), rows, drawn, step + 1


def _write(plan: Plan, drawn: Drawn, step, logits_BV, ids_B, wants_B) -> Drawn:
    """The tokens of one step, with their ln p in the model's own distribution."""
    news = {"ids_BN": ids_B}
    if plan.keeps_logits:
        news["logits_BNV"] = logits_BV
    if plan.num_top is not None:
        num_top = plan.num_top

        def look():
            log_probs_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)
            taken_B1 = jnp.take_along_axis(log_probs_BV, jnp.maximum(ids_B, 0)[:, None], axis=-1)
            top_BK, top_ids_BK = jax.lax.top_k(log_probs_BV, num_top)
            return taken_B1[:, 0], top_ids_BK, top_BK

        def skip():
            shape = (len(ids_B), num_top)
            return jnp.zeros(len(ids_B)), jnp.zeros(shape, jnp.int32), jnp.zeros(shape)

        names = ("log_probs_BN", "top_ids_BNK", "top_log_probs_BNK")
        found = jax.lax.cond(jnp.any(wants_B & (ids_B >= 0)), look, skip)
        news |= dict(zip(names, found, strict=True))
    return dataclasses.replace(
        drawn, **{name: getattr(drawn, name).at[:, step].set(new) for name, new in news.items()}
    )


def _placed(plan: Plan, pool: Pool) -> Pool:
    return pool if plan.place is None else jax.lax.with_sharding_constraint(pool, plan.place)
