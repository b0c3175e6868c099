"""Which rows of which group the TPU kernels take in turn, and on which of two cores.

Rows are counted in blocks of 16, which is what a row offset in a TPU's memory can be for every type
here. A visit is one product of a static number of rows, a height; its rows begin where its group
begins, rounded down to a block, so no visit but those at a group's edges holds rows of another. A
group takes as many of the tallest visits as fit, and the rest by a few shorter ones.

The tables are made by jnp on the device from the group sizes; the host never waits for them.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.ops.group_sizes import GroupSizes, Prepared, plain

BLOCK = 16
NUM_CORES = 2
# What a visit costs beyond its rows, in rows of work: counted on compiled kernels (see BUILD.md).
VISIT_ROWS = 9
AT_MOST = 4  # visits of what the tallest ones leave of a group
# Of a piece: where in a number of 15 bits its kind, blocks and those before it are, and the masks.
PACKED = ((0, 7), (3, 63), (9, 63))
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

    def packed(self) -> list[list[int]]:
        """kind, blocks and before of two pieces in one number, for each rest: as PACKED says."""
        parts = zip((self.kind, self.blocks, self.before), PACKED, strict=True)
        codes = np.sum([part << shift for part, (shift, _) in parts], axis=0)
        codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
        return (codes[:, ::2] + (codes[:, 1::2] << 15)).T.tolist()


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


def fitted(num_rows: int, heights: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Rows that tables are made for, in whole blocks, and the heights that are no more."""
    rows = max(-(-num_rows // BLOCK) * BLOCK, heights[-1])
    return rows, tuple(height for height in heights if height <= rows)


def prepared(
    group_sizes: jax.Array, of_rows: Iterable[tuple], of_sums: Iterable[tuple]
) -> Prepared:
    """The sizes with the tables of `row_visits` and `outer_visits` for what `fitted` gave."""
    tables = {_name("rows", *how): row_visits(group_sizes, *how) for how in of_rows}
    tables |= {_name("sums", *how): outer_visits(group_sizes, None, *how) for how in of_sums}
    return Prepared(group_sizes, tables)


def _name(what: str, num_rows: int, heights: tuple[int, ...]) -> str:
    return f"{what} {num_rows} {heights}"


def visits_of_rows(group_sizes: GroupSizes, num_rows: int, heights: tuple[int, ...]) -> Visits:
    """`row_visits`, found among those prepared or made."""
    found = _found(group_sizes, _name("rows", num_rows, heights))
    return row_visits(plain(group_sizes), num_rows, heights) if found is None else found


def visits_of_sums(
    group_sizes: GroupSizes, groups: jax.Array | None, num_rows: int, heights: tuple[int, ...]
) -> Visits:
    """`outer_visits`, found among those prepared or made."""
    found = None if groups is not None else _found(group_sizes, _name("sums", num_rows, heights))
    return outer_visits(plain(group_sizes), groups, num_rows, heights) if found is None else found


def _found(group_sizes: GroupSizes, name: str) -> Visits | None:
    return group_sizes.tables.get(name) if isinstance(group_sizes, Prepared) else None


def row_visits(group_sizes: jax.Array, num_rows: int, heights: tuple[int, ...]) -> Visits:
    """The visits of all rows, split in two parts of like cost at a block: [2, V].

    num_rows: a multiple of 16, and at least heights[0].
    """
    sizes, num_groups = group_sizes.astype(jnp.int32), group_sizes.size
    group = jnp.arange(num_groups + 1)
    starts = _sums_up_to(sizes, group - 1)
    ends = jnp.where(group < num_groups, _sums_up_to(sizes, group), num_rows)
    blocks, num_blocks = _blocks(starts, ends), num_rows // BLOCK
    cut = _middle(*blocks, jnp.sum(sizes), num_blocks, heights)
    core = jnp.arange(NUM_CORES)[:, None]
    first, count = _between(
        *blocks, jnp.where(core == 0, 0, cut), jnp.where(core == 0, cut, num_blocks)
    )
    most = pieces(heights, AT_MOST).kind.shape[1]
    v_max = -(-num_rows // heights[0]) + most * (num_groups + 2)
    how = heights, AT_MOST, v_max
    group, within, visits, kind, block, count, num = _of_core(
        first, count, group == num_groups, how
    )
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
    sizes, num_groups = group_sizes.astype(jnp.int32), group_sizes.size
    starts, ends = (_sums_up_to(sizes, jnp.arange(num_groups) - less) for less in (1, 0))
    if groups is not None:
        ends = jnp.where(groups, ends, starts)
    first, last = _blocks(starts, ends)
    v_max = -(-num_rows // heights[0]) + 2 * num_groups
    # One block for those of nothing, so that they too are visited.
    nothing = first == last
    first, count = jnp.where(nothing, 0, first), jnp.where(nothing, 1, last - first)
    of = _of_core(first[None], count[None], nothing, (heights, 1, v_max))
    group, within, visits, kind, block, count, num = of
    is_nothing = kind == len(heights)
    kind = jnp.where(within < visits - 1, len(heights), kind)
    kind = jnp.where(is_nothing, len(heights) + 1, kind)
    return _placed(group, kind, block, count, num, starts, ends, num_rows, heights)


def _placed(group, kind, block, count, num, starts, ends, num_rows, heights) -> Visits:
    """Visits of `count` blocks from `block` on, with where their rows are fetched and computed."""
    tallest = heights[0] // BLOCK
    size = _looked_up(kind, [*(h // BLOCK for h in heights), tallest, 1])
    size = jnp.maximum(jnp.where(kind == len(heights), count, size), count)
    fetch = jnp.minimum(block, num_rows // BLOCK - tallest)
    skip = jnp.minimum(block - fetch, tallest - size)
    lead = block - fetch - skip
    return Visits(group, kind, fetch, skip, lead, count, num, starts, ends)


# A TPU takes about 2,100 cycles for each of XLA's programs, however small, so these tables are made
# of what XLA puts into few: element by element and sums, no gathers, loops, slices or cumulative
# sums.


def _looked_up(index: jax.Array, table: Sequence[int] | np.ndarray) -> jax.Array:
    """table[index] of constants, for index >= 0."""
    found = jnp.full_like(index, int(table[0]))
    for at in range(1, len(table)):
        if table[at] != table[at - 1]:
            found = jnp.where(index >= at, int(table[at]), found)
    return found


def _sums_up_to(values_E: jax.Array, ends: jax.Array) -> jax.Array:
    """Of the last dim's values, those whose place is at most each of `ends`: [..., ends]."""
    inside = jnp.arange(values_E.shape[-1]) <= ends[:, None]
    return jnp.sum(jnp.where(inside, values_E[..., None, :], 0), axis=-1)


def _blocks(starts: jax.Array, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First block of each group and the one past its last; equal for an empty group."""
    first = _divided(starts, BLOCK)[0]
    return first, jnp.where(ends > starts, _divided(ends + BLOCK - 1, BLOCK)[0], first)


def _divided(count: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and rest of what is not negative; a TPU has no division but of powers of two."""
    if by & (by - 1) == 0:
        return count >> (by.bit_length() - 1), count & (by - 1)
    quotient = jax.lax.div(count, jnp.full_like(count, by))
    return quotient, count - quotient * by


def _between(first, last, low, high) -> tuple[jax.Array, jax.Array]:
    """First block and number of blocks of each group from block `low` to `high`."""
    begin = jnp.clip(first, low, high)
    return begin, jnp.maximum(jnp.clip(last, low, high) - begin, 0)


def _middle(first, last, total, num_blocks: int, heights: tuple[int, ...]) -> jax.Array:
    """The block at which the costlier side costs least; rows of no group cost nothing.

    Tried are those near the one that halves the rows and, for a large group beside many small ones,
    sixteenths of all. total: rows of all groups, which are all but the last.
    """
    tried = jnp.arange(64)
    tallest, table = heights[0] // BLOCK, pieces(heights, AT_MOST).cost

    def near(step):
        part = step - 2 * NEAR  # from 1 to 15
        beside = _divided(total, 2 * BLOCK)[0] + step - NEAR
        return jnp.clip(
            jnp.where(part > 0, _divided(part * num_blocks, 16)[0], beside), 0, num_blocks
        )

    def cost(low, high):
        count = _between(first, last, low, high)[1]
        whole, rest = _divided(count, tallest)
        each = whole * (heights[0] + VISIT_ROWS) + _looked_up(rest, table)
        return jnp.sum(jnp.where(jnp.arange(first.size) < first.size - 1, each, 0), axis=-1)

    cut = near(tried)[:, None]
    most = jnp.maximum(cost(0, cut), cost(cut, num_blocks))
    # The cost and the place as one number, of which the least has both: 2^25 rows at most.
    return near(jnp.min(most * 64 + tried) & 63)


def _of_core(
    first: jax.Array, count: jax.Array, nothing: jax.Array, how: tuple[tuple[int, ...], int, int]
) -> tuple[jax.Array, ...]:
    """Visits of cores [C, V], whose share of each group is `count` blocks from `first` [C, E].

    nothing [E]: groups whose blocks are filled with zeros at any height, up to the tallest. how:
    heights, visits of a rest at most, V. Returns per visit its group, place in the group, the
    group's visits, kind, first block and blocks; and the number of visits [C]. Entries past it are
    the last visit's, or of no block where there is none.
    """
    heights, at_most, v_max = how
    tallest, table = heights[0] // BLOCK, pieces(heights, at_most)
    group = jnp.arange(count.shape[-1])
    whole, rest = _divided(count, tallest)
    visits = whole + jnp.where(nothing, rest > 0, _looked_up(rest, table.num))
    up_to, num = _sums_up_to(visits, group), jnp.sum(visits, axis=-1)
    v = jnp.clip(jnp.arange(v_max, dtype=jnp.int32), 0, jnp.maximum(num[:, None] - 1, 0))
    before = up_to - visits
    mine = (v[..., None] >= before[:, None]) & (v[..., None] < up_to[:, None])

    def its(values_CE: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mine, values_CE[..., None, :], 0), axis=-1)

    # Computed of one group too: a constant may lie in another memory than the other tables, and a
    # kernel is compiled for each such difference.
    of_group = jnp.minimum(jnp.sum(v[..., None] >= up_to[:, None], axis=-1), group[-1])
    packed = [its(_looked_up(rest, codes)) for codes in table.packed()]
    within, whole, is_nothing = v - its(before), its(whole), its(nothing.astype(jnp.int32)) > 0
    piece = jnp.clip(within - whole, 0, table.kind.shape[1] - 1)
    code = jnp.where(piece < 2, packed[0], packed[-1]) >> jnp.where(piece & 1, 15, 0)
    is_rest = within >= whole
    of_rest = [jnp.where(is_rest, code >> shift & size, 0) for shift, size in PACKED]
    kind = jnp.where(is_nothing, len(heights), of_rest[0])
    blocks = jnp.where(is_rest, jnp.where(is_nothing, its(rest), of_rest[1]), tallest)
    offset = jnp.minimum(within, whole) * tallest + of_rest[2]
    arrays = (of_group, within, its(visits), kind, its(first) + offset, blocks, num)
    return tuple(a.astype(jnp.int32) for a in arrays)
