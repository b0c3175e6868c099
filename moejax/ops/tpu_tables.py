"""The tables of visits of the TPU kernels, made from group sizes by a kernel of its own.

One core's scalar unit goes through the groups; the host never waits for it. Of XLA's own operations
a table was up to 24 programs, of 2,100 cycles each (see BUILD.md).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.ops.group_sizes import GroupSizes, Prepared, plain
from moejax.ops.tpu_visits import (
    BLOCK,
    PER_VISIT,
    VISIT_ROWS,
    Reader,
    Table,
    Visit,
    Visits,
    Wanted,
)

# How far from the middle, in blocks, the cut between the cores is sought.
NEAR = 24


def prepared(group_sizes: jax.Array, wanted: Sequence[Wanted], interpret: Any = False) -> Prepared:
    """The sizes with those tables, by what they are for."""
    made = tables(group_sizes, None, tuple(wanted), bool(interpret))
    return Prepared(group_sizes, {str(one): each for one, each in zip(wanted, made, strict=True)})


def table_for(
    group_sizes: GroupSizes, groups: jax.Array | None, wanted: Wanted, interpret: Any = False
) -> Table:
    """Found among those prepared, or made. groups: bool [E], those that sums are asked of."""
    if isinstance(group_sizes, Prepared) and groups is None and str(wanted) in group_sizes.tables:
        return group_sizes.tables[str(wanted)]
    return tables(plain(group_sizes), groups, (wanted,), bool(interpret))[0]


def visits(group_sizes: jax.Array, wanted: Wanted, groups: jax.Array | None = None) -> Visits:
    """On the host, for who wants to look at them; entries from num on mean nothing."""
    numbers = np.array(tables(group_sizes, groups, (wanted,), True)[0].numbers)
    per_visit = numbers[: PER_VISIT * wanted.cores].reshape(PER_VISIT, wanted.cores, -1)
    starts, ends, num = numbers[PER_VISIT * wanted.cores :]
    return Visits._make([*per_visit, starts, ends, num[: wanted.cores]])


@functools.partial(jax.jit, static_argnums=(2, 3))
def tables(
    group_sizes: jax.Array, groups: jax.Array | None, wanted: tuple[Wanted, ...], interpret: bool
) -> list[Table]:
    """All of them, by one kernel."""
    num_groups = group_sizes.size
    asked = jnp.ones(num_groups, bool) if groups is None else groups
    numbers = [group_sizes.astype(jnp.int32), asked.astype(jnp.int32)]
    numbers += [jnp.asarray(one.pieces.codes) for one in wanted]
    shapes = [shape for one in wanted for shape in (one.shape(num_groups), (1,))]
    in_smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    moved = 4 * (sum(a.size for a in numbers) + sum(math.prod(shape) for shape in shapes))
    found = pl.pallas_call(
        functools.partial(_kernel, wanted=wanted),
        in_specs=[in_smem] * len(numbers),
        out_specs=[in_smem] * len(shapes),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes],
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=moved, transcendentals=0),
        interpret=interpret,
        name="tables_of_visits",
    )(*numbers)
    return [Table(*found[i : i + 2]) for i in range(0, len(found), 2)]


def _kernel(sizes, asked, *refs, wanted):
    for at, one in enumerate(wanted):
        codes, numbers, most = refs[at], *refs[len(wanted) + 2 * at : len(wanted) + 2 * at + 2]
        writer = _Writer(one, sizes, asked, codes, Reader(numbers, one.cores))
        writer.put_bounds()
        if one.sums:
            nums = [writer.put_sums()]
        else:
            cut, num_blocks = writer.middle(), one.num_rows // BLOCK
            nums = [writer.put_rows(0, 0, cut), writer.put_rows(1, cut, num_blocks)]
        most[0] = functools.reduce(jnp.maximum, nums)
        for core, num in enumerate(nums):
            numbers[PER_VISIT * one.cores + 2, core] = num
            writer.fill(core, num, most[0])


class _Writer(NamedTuple):
    """Makes one table. Blocks are counted from the first row."""

    wanted: Wanted
    sizes: Any
    asked: Any
    codes: Any
    table: Reader

    @property
    def tallest(self) -> int:
        return self.wanted.heights[0] // BLOCK

    @property
    def num_groups(self) -> int:
        return self.sizes.shape[0]

    def put_bounds(self) -> None:
        """Rows of each group, none if it is not asked for; those past all are one more."""
        numbers, row = self.table.numbers, PER_VISIT * self.table.cores

        def put(e, start):
            end = start + self.sizes[e]
            numbers[row, e] = start
            numbers[row + 1, e] = jnp.where(self.asked[e] != 0, end, start)
            return end

        end = jax.lax.fori_loop(0, self.num_groups, put, np.int32(0))
        numbers[row, self.num_groups] = end
        numbers[row + 1, self.num_groups] = self.wanted.num_rows

    def blocks(self, group: Any) -> tuple[Any, Any]:
        """First block of a group and the one past its last; equal for an empty one."""
        start, end = self.table.start(group), self.table.end(group)
        first = start >> 4
        return first, jnp.where(end > start, (end + BLOCK - 1) >> 4, first)

    def cost(self, count: Any) -> Any:
        """Of `count` blocks of one group, in rows of work."""
        whole = jax.lax.div(count, np.int32(self.tallest))
        each = self.wanted.heights[0] + VISIT_ROWS
        return whole * each + self.codes[count - whole * self.tallest, 1]

    def middle(self) -> Any:
        """The block at which the costlier side costs least; rows of no group cost nothing.

        Tried are those within NEAR of where half of the cost is reached: inside a group, which both
        cores have then, and between two that share no block.
        """

        def add(e, total):
            first, last = self.blocks(e)
            return total + self.cost(last - first)

        total = jax.lax.fori_loop(0, self.num_groups, add, np.int32(0))
        each = self.wanted.heights[0] + VISIT_ROWS

        def better(found, cut, left, right):
            least, best = found
            most = jnp.maximum(left, right)
            return jnp.where(most < least, most, least), jnp.where(most < least, cut, best)

        def attempt(e, carry):
            before, earlier, found = carry
            first, last = self.blocks(e)
            count = last - first
            after = total - before - self.cost(count)
            between = (count > 0) & (earlier <= first)
            whole = jnp.where(between, before, total)  # as dear as it can be where there is no cut
            found = better(found, first, whole, jnp.where(between, total - before, total))
            near = jax.lax.div(((total >> 1) - before) * self.tallest, np.int32(each))

            def inside(part, found):
                left, right = before + self.cost(part), self.cost(count - part) + after
                return better(found, first + part, left, right)

            low, high = jnp.maximum(near - NEAR, 1), jnp.minimum(near + NEAR + 1, count)
            found = jax.lax.fori_loop(low, high, inside, found)
            return total - after, jnp.where(count > 0, last, earlier), found

        found = (np.int32(2**31 - 1), np.int32(0))
        start = (np.int32(0), np.int32(0), found)
        return jax.lax.fori_loop(0, self.num_groups, attempt, start)[2][1]

    def put_rows(self, core: int, low: Any, high: Any) -> Any:
        """All visits of a core, which has the blocks from `low` to `high`; how many they are."""

        def put_share(e, v, kind):
            """The tallest visits of a group; the next one's place, and the blocks left for it."""
            first, last = self.blocks(e)
            first = jnp.clip(first, low, high)
            count = jnp.maximum(jnp.clip(last, low, high) - first, 0)
            whole = jax.lax.div(count, np.int32(self.tallest))
            self.put_whole(core, v, e, first, whole, kind)
            return v + whole, first + whole * self.tallest, count - whole * self.tallest

        def of_group(e, v):
            v, first, rest = put_share(e, v, 0)
            num = self.codes[rest, 0]

            def piece(i, _):
                code = self.codes[rest, 2 + i]
                kind, blocks, before = code & 15, (code >> 4) & 255, code >> 12
                self.put(core, v + i, Visit(e, kind, first + before, 0, 0, blocks, 0, 0))
                return 0

            jax.lax.fori_loop(0, num, piece, 0)
            return v + num

        v = jax.lax.fori_loop(0, self.num_groups, of_group, np.int32(0))
        # Rows of no group are filled with zeros, at any height.
        none = len(self.wanted.heights)
        v, first, rest = put_share(self.num_groups, v, none)

        @pl.when(rest > 0)
        def _():
            self.put(core, v, Visit(self.num_groups, none, first, 0, 0, rest, 0, 0))

        return v + (rest > 0).astype(jnp.int32)

    def put_sums(self) -> Any:
        """All visits of all groups; how many they are.

        kind: the place of the height of a group's last visit; one past the heights for an earlier
        one, of the tallest height; two past them for a group without rows, which is visited once.
        """
        earlier, nothing = len(self.wanted.heights), len(self.wanted.heights) + 1

        def of_group(e, v):
            first, last = self.blocks(e)
            count = last - first
            before = jax.lax.div(jnp.maximum(count - 1, 0), np.int32(self.tallest))
            self.put_whole(0, v, e, first, before, earlier)
            left = count - before * self.tallest
            whole = left == self.tallest
            kind = jnp.where(whole, 0, self.codes[jnp.where(whole, 0, left), 2] & 15)
            kind, left = jnp.where(count == 0, nothing, kind), jnp.maximum(left, 1)
            place = first + before * self.tallest
            self.put(0, v + before, Visit(e, kind, place, 0, 0, left, 0, 0))
            return v + before + 1

        return jax.lax.fori_loop(0, self.num_groups, of_group, np.int32(0))

    def put_whole(self, core: int, v: Any, group: Any, first: Any, num: Any, kind: int) -> None:
        """`num` visits of the tallest height, one after another."""

        def put(i, _):
            block = first + i * self.tallest
            self.put(core, v + i, Visit(group, kind, block, 0, 0, self.tallest, 0, 0))
            return 0

        jax.lax.fori_loop(0, num, put, 0)

    def put(self, core: int, v: Any, visit: Visit) -> None:
        """A visit of `owned` blocks from block `fetch` on, with what is fetched and computed."""
        size: Any = 1
        for kind, height in enumerate(self.wanted.heights):
            size = jnp.where(visit.kind == kind, height // BLOCK, size)
        size = jnp.maximum(size, visit.owned)
        fetch = jnp.minimum(visit.fetch, self.wanted.num_rows // BLOCK - self.tallest)
        skip = jnp.minimum(visit.fetch - fetch, self.tallest - size)
        lead = visit.fetch - fetch - skip
        fields = (visit.group, visit.kind, fetch, skip, lead, visit.owned)
        for at, field in enumerate(fields):
            self.table.numbers[at * self.table.cores + core, v] = jnp.asarray(field, jnp.int32)

    def fill(self, core: int, num: Any, most: Any) -> None:
        """Steps past a core's visits stay at its last one, so that nothing is fetched for them."""

        @pl.when(num == 0)
        def _():
            self.put(core, 0, Visit(0, len(self.wanted.heights), 0, 0, 0, 1, 0, 0))

        last = jnp.maximum(num - 1, 0)

        def copy(v, _):
            for at in range(PER_VISIT):
                row = at * self.table.cores + core
                self.table.numbers[row, v] = self.table.numbers[row, last]
            return 0

        jax.lax.fori_loop(num, most, copy, 0)
