"""Attention over keys and values that lie in pages, read page by page.

Every row keeps its own list of pages (Kwon et al. 2023, arXiv 2309.06180, section 4.1), so rows of
any lengths share one pool of memory and samples of one prompt share its pages. The softmax is kept
up to date while pages arrive, as in `attention_blockwise`. A page that a row does not see changes
nothing of it, bit for bit (it multiplies by exp(0) and adds 0), so what a row gets depends neither
on its neighbours' lengths nor on where its pages lie.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moejax.ops.attention_spec import Visible, Window, limit_of, soft_capped

_LOW = -1e30  # finite: the difference of two of them is a number


def paged_attention(
    q_BTHC: jax.Array,
    k_AGSC: jax.Array,
    v_AGSC: jax.Array,
    visible: Visible,
    window: Window,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """`moejax.ops.attention.attention` where keys are a pool of A pages of S slots.

    Query t of row b stands in slot visible.slot[b] + t and sees the slots up to its own of the
    pages visible.pages_BP[b], in their order. Query head h uses the (h // (H / G))-th of the G
    groups visible.groups_K, or of all. float32 scores and sums; any window and head sizes.
    """
    num_batch, num_queries, num_heads, head_size = q_BTHC.shape
    num_groups, page_size = k_AGSC.shape[1:3]
    pages_BP, slot_B, groups_K = visible.pages_BP, visible.slot, visible.groups_K
    num_groups = num_groups if groups_K is None else groups_K.shape[0]
    assert pages_BP is not None and slot_B is not None
    q = q_BTHC.reshape(num_batch, num_queries, num_groups, num_heads // num_groups, head_size)
    q_BGTJC = jnp.transpose(q, (0, 2, 1, 3, 4))  # J: the heads that share one group
    slots_BT = slot_B[:, None] + jnp.arange(num_queries)
    limit = limit_of(window)

    def page_of(pool_AGSC, page_B):
        at = page_B if groups_K is None else (page_B[:, None], groups_K)
        return pool_AGSC[at]

    def read(page, carry):
        largest, total, mixed = carry
        k_BGSC, v_BGSC = (page_of(pool, pages_BP[:, page]) for pool in (k_AGSC, v_AGSC))
        scores = jnp.einsum(
            "bgtjc,bgsc->bgtjs", q_BGTJC, k_BGSC, preferred_element_type=jnp.float32
        )
        scores = soft_capped(scores * scale, soft_cap)
        age_BTS = slots_BT[..., None] - (page * page_size + jnp.arange(page_size))
        seen = ((age_BTS >= 0) & (age_BTS < limit))[:, None, :, None]
        new_largest = jnp.maximum(largest, jnp.max(scores, -1, where=seen, initial=_LOW))
        weights = jnp.where(seen, jnp.exp(scores - new_largest[..., None]), 0)
        shrink = jnp.exp(largest - new_largest)
        values = jnp.einsum(
            "bgtjs,bgsc->bgtjc",
            weights.astype(v_BGSC.dtype),
            v_BGSC,
            preferred_element_type=jnp.float32,
        )
        total = total * shrink + jnp.sum(weights, axis=-1)
        return new_largest, total, mixed * shrink[..., None] + values

    shape = q_BGTJC.shape[:-1]
    none = (
        jnp.full(shape, _LOW, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, v_AGSC.shape[-1]), jnp.float32),
    )
    first = jnp.maximum(jnp.min(slot_B) - limit + 1, 0) // page_size
    last = jnp.max(slot_B) + num_queries - 1
    end = jnp.minimum(last // page_size + 1, pages_BP.shape[1])
    _, total, mixed = jax.lax.fori_loop(first, end, read, none)
    # At least one weight of a query that sees anything is 1: the bound is for those that do not.
    out_BGTJC = (mixed / jnp.maximum(total, 1)[..., None]).astype(q_BTHC.dtype)
    out_BTGJC = jnp.transpose(out_BGTJC, (0, 2, 1, 3, 4))
    return out_BTGJC.reshape(num_batch, num_queries, num_heads, v_AGSC.shape[-1])
