"""Attention over pages equals attention over rows, whoever shares the pool."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.attention import AttentionSpec, Visible, attention
from moejax.ops.attention_paged import paged_attention

GROUPS, HEADS, SIZE, VALUE_SIZE, PAGE, NUM_PAGES = 2, 6, 5, 4, 4, 40
SLOTS = np.array([0, 3, 17, 30], np.int32)  # of each row's first query
RNG = np.random.default_rng(0)
KEYS = RNG.normal(size=(4, GROUPS, 36, SIZE)).astype(np.float32)
VALUES = RNG.normal(size=(4, GROUPS, 36, VALUE_SIZE)).astype(np.float32)


def in_pages(rows, seed):
    """The rows' keys and values in pages drawn at random; what is nobody's is filled with noise."""
    pages = np.random.default_rng(seed).permutation(NUM_PAGES)[: 9 * len(rows)]
    pages = pages.reshape(len(rows), 9).astype(np.int32)
    pools = []
    for source in (KEYS, VALUES):
        pool = np.random.default_rng(1).normal(size=(NUM_PAGES, GROUPS, PAGE, source.shape[-1]))
        pool = pool.astype(np.float32)
        for row, page_list in zip(rows, pages, strict=True):
            for number, page in enumerate(page_list):
                pool[page] = source[row, :, number * PAGE : number * PAGE + PAGE]
        pools.append(jnp.asarray(pool))
    return *pools, jnp.asarray(pages)


@functools.partial(jax.jit, static_argnames=("window", "soft_cap"))
def paged(q, k, v, pages, slots, window=0, soft_cap=None):
    visible = Visible(slot=slots, pages_BP=pages)
    return paged_attention(q, k, v, visible, window, 0.3, soft_cap)


@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("window, soft_cap", [(0, None), (6, 1.5)])
def test_equal_to_attention_over_rows(num_queries, window, soft_cap):
    q = RNG.normal(size=(4, num_queries, HEADS, SIZE)).astype(np.float32)
    found = paged(q, *in_pages(range(4), 2), SLOTS, window, soft_cap)
    spec = AttentionSpec(0.3, soft_cap, implementation="dense")
    for row, slot in enumerate(SLOTS):
        one = slice(row, row + 1)
        visible = Visible(slot=jnp.int32(slot), start_B=jnp.zeros(1, jnp.int32))
        expected = attention(q[one], KEYS[one], VALUES[one], visible, window, spec)
        np.testing.assert_allclose(found[one], expected, atol=1e-6)


def test_a_row_is_the_same_bits_beside_longer_rows_and_in_other_pages():
    q = RNG.normal(size=(4, 1, HEADS, SIZE)).astype(np.float32)
    found = paged(q, *in_pages(range(4), 2), SLOTS)
    short = SLOTS * np.array([1, 1, 0, 0], np.int32)
    other = paged(q, *in_pages(range(4), 3), short)
    np.testing.assert_array_equal(found[:2], other[:2])


@pytest.mark.parametrize("groups", [[1], [0], [1, 0]])
def test_only_the_groups_that_are_asked_for_are_read(groups):
    q = RNG.normal(size=(4, 1, HEADS, SIZE)).astype(np.float32)
    k, v, pages = in_pages(range(4), 2)
    whole = paged(q, k, v, pages, SLOTS)
    for other in set(range(GROUPS)) - set(groups):
        k, v = (pool.at[:, other].set(jnp.nan) for pool in (k, v))
    per_group = HEADS // GROUPS
    heads = np.concatenate([np.arange(per_group) + g * per_group for g in groups])
    visible = Visible(slot=jnp.asarray(SLOTS), pages_BP=pages, groups_K=jnp.asarray(groups))
    found = jax.jit(paged_attention, static_argnums=(4, 5, 6))(
        q[:, :, heads], k, v, visible, 0, 0.3, None
    )
    np.testing.assert_allclose(found, whole[:, :, heads], atol=1e-6)


def test_pages_are_read_by_one_implementation_only():
    q = np.zeros((4, 1, HEADS, SIZE), np.float32)
    k, v, pages = in_pages(range(4), 2)
    visible = Visible(slot=jnp.asarray(SLOTS), pages_BP=pages)
    with pytest.raises(NotImplementedError, match="'dense' and a cache that is in pages"):
        attention(q, k, v, visible, 0, AttentionSpec(implementation="dense"))
    with pytest.raises(NotImplementedError, match="'paged' and a cache that is not in pages"):
        attention(q, KEYS, VALUES, Visible(), 0, AttentionSpec(implementation="paged"))
