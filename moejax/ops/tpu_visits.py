"""Which rows of which group the TPU kernels take in turn, and on which of two cores.

Rows are counted in blocks of 16, which is what a row offset in a TPU's memory can be for every type
here. A visit is one product of a static number of rows, a height; its rows begin where its group
begins, rounded down to a block, so no visit but those at a group's edges holds rows of another. A
group takes as many of the tallest visits as fit, and the rest by a few shorter ones.

The tables are made by jnp on the device from the group sizes; the host never waits for them.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 16
NUM_CORES = 2
# What a visit costs beyond its rows, in rows of work: counted on compiled kernels (see BUILD.md).
VISIT_ROWS = 9
AT_MOST = 4  # visits of what the tallest ones leave of a group
# How far from the middle, in blocks, the cut between the cores is sought.
NEAR = 24


class Visits(NamedTuple):
    """Per core and visit [C, V]; num [C] are real.

    As many blocks as the tallest height has are fetched from block `fetch` on. The visit computes
    those from `skip` on, as many as its height has, and owns `owned` of them from `lead` on: a
    height may be a block more than what is left of a group, and at the end of the rows that one
    lies before it. kind: the place of the height in the list of heights; one past it for rows of no
    group. starts, ends [E + 1]: rows of each group, the last being the rows past all others.
    """

    group: jax.Array
    kind: jax.Array
    fetch: jax.Array
    skip: jax.Array
    lead: jax.Array
    owned: jax.Array
    num: jax.Array
    starts: jax.Array
    ends: jax.Array


class Pieces(NamedTuple):
    """For a rest of b blocks, b below those of the tallest height: a few visits.

    num [B]; kind, blocks and the blocks before each [B, most]; cost [B], in rows of work.
    """

    num: np.ndarray
    kind: np.ndarray
    blocks: np.ndarray
    before: np.ndarray
    cost: np.ndarray


@functools.lru_cache
def pieces(heights: tuple[int, ...], at_most: int) -> Pieces:
    """The cheapest few of `heights` (falling, multiples of 16) for each rest of rows."""
    found: list[tuple] = [(0, 0, (), ())]
    for rest in range(1, heights[0] // BLOCK):
        ways = []
        for num in range(1, at_most + 1):
            for kinds in itertools.combinations_with_replacement(range(len(heights)), num):
                *sizes, last = (heights[kind] // BLOCK for kind in kinds)
                if 0 < (left := rest - sum(sizes)) <= last:
                    cost = sum(heights[kind] for kind in kinds) + num * VISIT_ROWS
                    ways.append((cost, num, kinds, (*sizes, left)))
        found.append(min(ways))
    most = max(1, *(num for _, num, *_ in found))
    kind, blocks = np.zeros((2, len(found), most), np.int32)
    for row, (_, num, kinds, sizes) in enumerate(found):
        kind[row, :num], blocks[row, :num] = kinds, sizes
    costs, nums = (np.asarray([one[i] for one in found], np.int32) for i in range(2))
    return Pieces(nums, kind, blocks, np.cumsum(blocks, axis=1) - blocks, costs)


def row_visits(group_sizes: jax.Array, num_rows: int, heights: tuple[int, ...]) -> Visits:
    """The visits of all rows, split in two parts of like cost at a block: [2, V].

    num_rows: a multiple of 16, and at least heights[0].
    """
    past = num_rows - jnp.sum(group_sizes, keepdims=True)
    sizes = jnp.concatenate([group_sizes, past]).astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    blocks = _blocks(starts, ends)
    first, count = _parts(*blocks, _middle(*blocks, num_rows // BLOCK, heights), num_rows // BLOCK)
    nothing = jnp.arange(sizes.size) == sizes.size - 1
    most = pieces(heights, AT_MOST).kind.shape[1]
    v_max = -(-num_rows // heights[0]) + most * (sizes.size + 1)
    of = functools.partial(_of_core, heights=heights, at_most=AT_MOST, v_max=v_max)
    per_core = jax.vmap(of, (0, 0, None))
    group, within, visits, kind, block, count, num = per_core(first, count, nothing)
    del within, visits
    return _placed(group, kind, block, count, num, starts, ends, num_rows, heights)


def outer_visits(
    group_sizes: jax.Array, groups: jax.Array | None, num_rows: int, heights: tuple[int, ...]
) -> Visits:
    """The visits of all groups for the gradient of their matrices: [1, V], for both cores.

    kind: the place of the height of a group's last visit; one past the heights for an earlier
    visit, of the tallest height; two past them for a group without rows or not asked for, which is
    visited once. num_rows as in `row_visits`.
    """
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    starts = ends - group_sizes.astype(jnp.int32)
    if groups is not None:
        ends = jnp.where(groups, ends, starts)
    first, last = _blocks(starts, ends)
    v_max = -(-num_rows // heights[0]) + 2 * group_sizes.size
    count = last - first
    # One block for those of nothing, so that they too are visited.
    nothing = count == 0
    first = jnp.where(nothing, 0, first)
    several = functools.partial(_of_core, heights=heights, at_most=1, v_max=v_max)
    of = several(first, jnp.maximum(count, 1), nothing)
    group, within, visits, kind, block, count, num = (a[None] for a in of)
    kind = jnp.where(within < visits - 1, len(heights), kind)
    kind = jnp.where(nothing[group], len(heights) + 1, kind)
    return _placed(group, kind, block, count, num, starts, ends, num_rows, heights)


def _placed(group, kind, block, count, num, starts, ends, num_rows, heights) -> Visits:
    """Visits of `count` blocks from `block` on, with where their rows are fetched and computed."""
    tallest = heights[0] // BLOCK
    size = jnp.asarray([h // BLOCK for h in heights] + [tallest, 1])[kind]
    size = jnp.maximum(jnp.where(kind == len(heights), count, size), count)
    fetch = jnp.minimum(block, num_rows // BLOCK - tallest)
    skip = jnp.minimum(block - fetch, tallest - size)
    lead = block - fetch - skip
    return Visits(group, kind, fetch, skip, lead, count, num, starts, ends)


def _blocks(starts: jax.Array, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First block of each group and the one past its last; equal for an empty group."""
    first = starts // BLOCK
    return first, jnp.where(ends > starts, -(-ends // BLOCK), first)


def _parts(first, last, cut, num_blocks: int) -> tuple[jax.Array, jax.Array]:
    """First block and number of blocks of each group on either side of a cut: [2, E]."""
    low = jnp.stack([jnp.zeros_like(cut), cut])[:, None]
    high = jnp.stack([cut, jnp.full_like(cut, num_blocks)])[:, None]
    begin = jnp.clip(first, low, high)
    return begin, jnp.maximum(jnp.clip(last, low, high) - begin, 0)


def _middle(first, last, num_blocks: int, heights: tuple[int, ...]) -> jax.Array:
    """The block at which the costlier side costs least; rows of no group cost nothing.

    Tried are those near the one that halves the blocks.
    """
    blocks = jnp.cumsum((last - first)[:-1])
    half = blocks[-1] // 2
    group = jnp.searchsorted(blocks, half)
    middle = last[group] - (blocks[group] - half)
    near = jnp.clip(middle + jnp.arange(-NEAR, NEAR + 1), 0, num_blocks).astype(jnp.int32)
    count = jax.vmap(lambda cut: _parts(first, last, cut, num_blocks)[1][:, :-1])(near)
    tallest, table = heights[0] // BLOCK, jnp.asarray(pieces(heights, AT_MOST).cost)
    cost = count // tallest * (heights[0] + VISIT_ROWS) + table[count % tallest]
    return near[jnp.argmin(jnp.max(jnp.sum(cost, axis=2), axis=1))]


def _of_core(
    first: jax.Array,
    count: jax.Array,
    nothing: jax.Array,
    *,
    heights: tuple[int, ...],
    at_most: int,
    v_max: int,
) -> tuple[jax.Array, ...]:
    """Visits of one core, whose share of each group is `count` blocks from `first`: all [E].

    nothing [E]: groups whose blocks are filled with zeros at any height, up to the tallest. Returns
    per visit [V] its group, place in the group, the group's visits, kind, first block and blocks;
    and the number of visits.
    """
    tallest, table = heights[0] // BLOCK, pieces(heights, at_most)
    whole, rest = count // tallest, count % tallest
    visits = whole + jnp.where(nothing, rest > 0, jnp.asarray(table.num)[rest])
    up_to = jnp.cumsum(visits)
    v = jnp.arange(v_max, dtype=jnp.int32)
    g = jnp.minimum(jnp.searchsorted(up_to, v, side="right"), count.size - 1)
    within = v - (up_to - visits)[g]
    piece = jnp.clip(within - whole[g], 0, table.kind.shape[1] - 1)
    is_rest = within >= whole[g]
    offset = jnp.minimum(within, whole[g]) * tallest
    offset += jnp.where(is_rest, jnp.asarray(table.before)[rest[g], piece], 0)
    kind = jnp.where(is_rest, jnp.asarray(table.kind)[rest[g], piece], 0)
    blocks = jnp.where(is_rest, jnp.asarray(table.blocks)[rest[g], piece], tallest)
    kind = jnp.where(nothing[g], len(heights), kind)
    blocks = jnp.where(nothing[g] & is_rest, rest[g], blocks)
    arrays = (g, within, visits[g], kind, first[g] + offset, blocks, up_to[-1])
    return tuple(a.astype(jnp.int32) for a in arrays)
