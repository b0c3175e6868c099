"""Which rows of which group the TPU kernels take in turn, and on which of two cores.

Rows are counted in blocks of 16, which is what a row offset in a TPU's memory can be for every type
here. A visit is one product of a static number of rows, a height; its rows begin where its group
begins, rounded down to a block, so no visit but those at a group's edges holds rows of another. A
group takes as many of the tallest visits as fit, and the rest by a few shorter ones.

`moejax.ops.tpu_tables` makes the tables.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

BLOCK = 16
NUM_CORES = 2
# What a visit costs beyond its rows, in rows of work: counted on compiled kernels (see BUILD.md).
VISIT_ROWS = 9
AT_MOST = 4  # visits of what the tallest ones leave of a group


class Visits(NamedTuple):
    """Per core and visit [C, V], the first of these fields; num [C] are real.

    As many blocks as the tallest height has are fetched from block `fetch` on. The visit computes
    those from `skip` on, as many as its height has, and owns `owned` of them from `lead` on: a
    height may be a block more than what is left of a group, and at the end of the rows that one
    lies before it. kind: the place of the height in the list of heights, or past them.
    starts, ends [E + 1]: rows of each group, the last being the rows past all others.
    """

    group: Any
    kind: Any
    fetch: Any
    skip: Any
    lead: Any
    owned: Any
    starts: Any
    ends: Any
    num: Any


PER_VISIT = Visits._fields.index("starts")


class Visit(NamedTuple):
    """One of `Visits`, with the rows of its group."""

    group: Any
    kind: Any
    fetch: Any
    skip: Any
    lead: Any
    owned: Any
    start: Any
    end: Any


class Wanted(NamedTuple):
    """What a table is for: products of the rows, or sums of a group's; of how many rows (a multiple
    of 16, and at least the tallest height), by visits of which heights (falling)."""

    sums: bool
    num_rows: int
    heights: tuple[int, ...]

    @property
    def cores(self) -> int:
        """Sums of all groups are visited by both cores alike, each for its half of a matrix."""
        return 1 if self.sums else NUM_CORES

    @property
    def pieces(self) -> "Pieces":
        return pieces(self.heights, 1 if self.sums else AT_MOST)

    def shape(self, num_groups: int) -> tuple[int, int]:
        """F, V of the table: a group has blocks that are another's too, and a rest on each core."""
        blocks = self.num_rows // BLOCK + num_groups + 1
        whole = -(-blocks // (self.heights[0] // BLOCK))
        return PER_VISIT * self.cores + 3, whole + self.pieces.most * (num_groups + self.cores)


class Table(NamedTuple):
    """`Visits` as a kernel gets them, one array: a kernel is compiled once more for each memory
    that one of its operands may lie in, and waits once for each before it begins.

    numbers [F, V]: the fields per visit, each with a row for every core; then starts, ends and num.
    most [1]: of num, how many steps the cores take. (A number in no array is another such memory.)
    """

    numbers: jax.Array
    most: jax.Array


class Reader(NamedTuple):
    """A `Table` where a kernel or its index maps find it."""

    numbers: Any
    cores: int

    def group(self, core: Any, v: Any) -> Any:
        return self.numbers[core, v]

    def fetch(self, core: Any, v: Any) -> Any:
        return self.numbers[Visits._fields.index("fetch") * self.cores + core, v]

    def visit(self, core: Any, v: Any) -> Visit:
        fields = [self.numbers[at * self.cores + core, v] for at in range(PER_VISIT)]
        return Visit._make([*fields, self.start(fields[0]), self.end(fields[0])])

    def start(self, group: Any) -> Any:
        return self.numbers[PER_VISIT * self.cores, group]

    def end(self, group: Any) -> Any:
        return self.numbers[PER_VISIT * self.cores + 1, group]

    def num(self, core: Any) -> Any:
        return self.numbers[PER_VISIT * self.cores + 2, core]


class Pieces(NamedTuple):
    """For a rest of b blocks, b below those of the tallest height: a few visits, at most `most`.

    codes [B, 2 + most]: how many, what they cost in rows of work, and each: its kind, its blocks
    and the blocks before it, in 4, 8 and 8 bits.
    """

    most: int
    codes: np.ndarray


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
    codes = np.zeros((len(found), 2 + most), np.int32)
    for row, (cost, num, kinds, sizes) in zip(codes, found, strict=True):
        before = itertools.accumulate(sizes, initial=0)
        row[:2] = num, cost
        row[2 : 2 + num] = [
            kind | size << 4 | earlier << 12
            for kind, size, earlier in zip(kinds, sizes, before, strict=False)
        ]
    return Pieces(most, codes)


def fitted(num_rows: int, heights: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Rows that tables are made for, in whole blocks, and the heights that are no more."""
    rows = max(-(-num_rows // BLOCK) * BLOCK, heights[-1])
    return rows, tuple(height for height in heights if height <= rows)
