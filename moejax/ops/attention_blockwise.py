"""Attention with memory linear in the length of the text: keys are read block by block.

The softmax over all keys is kept up to date while blocks arrive (Milakov and Gimelshein 2018, and
FlashAttention, Dao et al. 2022, algorithms 1 and 4): with m the largest score so far, l the sum of
exp(s - m) and o the same sum of values,

    m' = max(m, max s),   l' = l e^(m - m') + sum e^(s - m'),   o' = o e^(m - m') + e^(s - m') V

The backward pass computes the scores again from q, k and log l + m. Blocks that no query of a block
sees (later keys, keys before the window) are never visited.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moejax.ops.attention_spec import Visible, Window, block_mask, in_window, limit_of, soft_capped
from moejax.ops.kept import ATTENTION

BLOCK = 256
_LOW = -1e30  # finite: the difference of two of them is a number


@dataclasses.dataclass(frozen=True)
class _Scores:
    """What turns products of queries and keys into scores, and the sizes of the blocks."""

    scale: float
    soft_cap: float | None
    q_block: int
    k_block: int


def blockwise_attention(
    q_BTHC: jax.Array,
    k_BGSC: jax.Array,
    v_BGSC: jax.Array,
    visible: Visible,
    window: Window,
    scale: float,
    soft_cap: float | None,
    block: int = BLOCK,
) -> jax.Array:
    """`moejax.ops.attention.attention` in blocks of `block` tokens.

    Any lengths, head sizes, windows and caches; differentiable in q, k and v.
    """
    num_batch, num_queries, num_heads, head_size = q_BTHC.shape
    num_groups, num_keys = k_BGSC.shape[1:3]
    blocks = (_even_blocks(size, block) for size in (num_queries, num_keys))
    scores = _Scores(scale, soft_cap, *blocks)
    q = q_BTHC.reshape(num_batch, num_queries, num_groups, num_heads // num_groups, head_size)
    q_BGJTC = jnp.transpose(q, (0, 2, 3, 1, 4))
    visible = dataclasses.replace(visible, mask_BTS=None)
    padded = _pad(q_BGJTC, 3, scores.q_block)
    keys, values = (_pad(x, 2, scores.k_block) for x in (k_BGSC, v_BGSC))
    out_BGJTC = _attend(scores, padded, keys, values, visible, jnp.asarray(window, jnp.int32))
    out_BTGJC = jnp.transpose(out_BGJTC[:, :, :, :num_queries], (0, 3, 1, 2, 4))
    return out_BTGJC.reshape(num_batch, num_queries, num_heads, v_BGSC.shape[-1])


def _even_blocks(size: int, most: int) -> int:
    """The size of the fewest blocks of at most `most` that leave little over."""
    return -(-size // -(-size // most))


def _pad(x: jax.Array, dim: int, block: int) -> jax.Array:
    pads = [(0, 0)] * x.ndim
    pads[dim] = (0, -x.shape[dim] % block)
    return jnp.pad(x, pads)


def _cut(x: jax.Array, dim: int, index, block: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scores: _Scores, q, k, v, visible: Visible, window) -> jax.Array:
    return _forward(scores, q, k, v, visible, window)[0]


def _forward(scores: _Scores, q, k, v, visible: Visible, window):
    """out [B, G, J, T, Cv] and what the backward pass needs."""

    def one_block(i):
        q_i = _cut(q, 3, i, scores.q_block)
        shape = q_i.shape[:4]

        def read(j, state):
            m, sums, o = state
            s, mask = _block_scores(scores, q_i, k, visible, window, (i, j))
            new = jnp.maximum(m, jnp.max(jnp.where(mask, s, _LOW), axis=-1))
            p = jnp.where(mask, jnp.exp(s - new[..., None]), 0.0)
            kept = jnp.exp(m - new)
            v_j = _cut(v, 2, j, scores.k_block)
            mixed = jnp.einsum(
                "bgjts,bgsc->bgjtc", p.astype(v.dtype), v_j, preferred_element_type=jnp.float32
            )
            return new, sums * kept + p.sum(-1), o * kept[..., None] + mixed

        start = (
            jnp.full(shape, _LOW),
            jnp.zeros(shape),
            jnp.zeros((*shape, v.shape[-1]), jnp.float32),
        )
        first, last = _key_blocks(scores, visible, window, i, k.shape[2])
        m, sums, o = jax.lax.fori_loop(first, last, read, start)
        sums = jnp.where(sums > 0, sums, 1.0)
        return (o / sums[..., None]).astype(q.dtype), m + jnp.log(sums)

    num_blocks = q.shape[3] // scores.q_block
    blocks, logs = jax.lax.map(one_block, jnp.arange(num_blocks))
    # Named so that a policy of `jax.checkpoint` can keep them: all that is dear to compute again.
    out = checkpoint_name(_joined(blocks), ATTENTION)
    log_sums = checkpoint_name(jnp.moveaxis(logs, 0, 3).reshape(q.shape[:4]), ATTENTION)
    return out, (q, k, v, visible, window, out, log_sums)


def _backward(scores: _Scores, saved, d_out):
    q, k, v, visible, window, out, log_sums = saved
    d_out32 = d_out.astype(jnp.float32)
    inner = jnp.sum(d_out32 * out.astype(jnp.float32), axis=-1)  # sum_j p_ij dp_ij

    def one_block(dq, j):
        k_j, v_j = (_cut(x, 2, j, scores.k_block) for x in (k, v))

        def read(i, state):
            dq, dk, dv = state
            q_i = _cut(q, 3, i, scores.q_block)
            d_i = _cut(d_out, 3, i, scores.q_block)
            log_i, inner_i = (_cut(x, 3, i, scores.q_block) for x in (log_sums, inner))
            s, mask = _block_scores(scores, q_i, k, visible, window, (i, j))
            p = jnp.where(mask, jnp.exp(s - log_i[..., None]), 0.0)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            dv = dv + product("bgjts,bgjtc->bgsc", p.astype(v.dtype), d_i)
            dp = product("bgjtc,bgsc->bgjts", d_i, v_j)
            ds = p * (dp - inner_i[..., None]) * scores.scale
            if scores.soft_cap is not None:
                ds = ds * (1 - jnp.square(s / scores.soft_cap))
            ds = ds.astype(q.dtype)
            dk = dk + product("bgjts,bgjtc->bgsc", ds, q_i)
            new = _cut(dq, 3, i, scores.q_block) + product("bgjts,bgsc->bgjtc", ds, k_j)
            dq = jax.lax.dynamic_update_slice_in_dim(dq, new, i * scores.q_block, 3)
            return dq, dk, dv

        first, last = _query_blocks(scores, visible, window, j, q.shape[3])
        empty = (jnp.zeros(x.shape, jnp.float32) for x in (k_j, v_j))
        dq, dk, dv = jax.lax.fori_loop(first, last, read, (dq, *empty))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    num_blocks = k.shape[2] // scores.k_block
    start = jnp.zeros(q.shape, jnp.float32)
    dq, (dk, dv) = jax.lax.scan(one_block, start, jnp.arange(num_blocks))
    return dq.astype(q.dtype), _joined(dk), _joined(dv), None, None


_attend.defvjp(_forward, _backward)


def _joined(blocks: jax.Array) -> jax.Array:
    """[n, ..., t, C] -> [..., n t, C]."""
    moved = jnp.moveaxis(blocks, 0, -3)
    return moved.reshape(*moved.shape[:-3], -1, moved.shape[-1])


def _block_scores(scores: _Scores, q_i, k, visible: Visible, window, index):
    """float32 scores [B, G, J, t, s] of one block and its mask, broadcastable."""
    i, j = index
    k_j = _cut(k, 2, j, scores.k_block)
    s = jnp.einsum("bgjtc,bgsc->bgjts", q_i, k_j, preferred_element_type=jnp.float32)
    first = i * scores.q_block
    queries = first + jnp.arange(scores.q_block) + (0 if visible.slot is None else visible.slot)
    keys = j * scores.k_block + jnp.arange(scores.k_block)
    parts: tuple[jax.Array | None, ...] = (None, None)
    if visible.segments_BT is not None:
        # No padded key is earlier than a real query: what its segment is called does not matter.
        blocks = (scores.q_block, scores.k_block)
        parts = tuple(
            _cut(_pad(visible.segments_BT, 1, math.lcm(*blocks)), 1, at, size)
            for at, size in zip(index, blocks, strict=True)
        )
    mask = block_mask(visible, queries, keys, *parts) & in_window(queries, keys, window)
    return soft_capped(s * scores.scale, scores.soft_cap), mask[:, None, None]


def _key_blocks(scores: _Scores, visible: Visible, window, i, num_keys: int):
    """First block of keys that some query of block i sees, and the one after the last."""
    first = i * scores.q_block + (0 if visible.slot is None else visible.slot)
    oldest = jnp.maximum(first - jnp.minimum(limit_of(window), num_keys) + 1, 0)
    newest = first + scores.q_block - 1
    blocks = num_keys // scores.k_block
    return oldest // scores.k_block, jnp.minimum(newest // scores.k_block + 1, blocks)


def _query_blocks(scores: _Scores, visible: Visible, window, j, num_queries: int):
    """First block of queries that see some key of block j, and the one after the last."""
    slot = 0 if visible.slot is None else visible.slot
    oldest = j * scores.k_block - slot
    last_key = oldest + scores.k_block - 1
    newest = last_key + jnp.minimum(limit_of(window), num_queries) - 1
    blocks = num_queries // scores.q_block
    first = jnp.maximum(oldest, 0) // scores.q_block
    # A negative newest (all queries are beyond the window) must give no block at all.
    return first, jnp.clip(newest // scores.q_block + 1, 0, blocks)
