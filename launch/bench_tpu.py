"""Rows of the grouped products on a TPU v5p, from cycles that the compiler counts in its schedule.

ideal cycles / (static cycles of one visit x the visits of the busier core), for 4,096 rows in 8
uneven groups, K 2,048, N 1,408, bfloat16: ideal is 2 M K N over 262,144 operations per cycle of a
chip. Visits of every height count at their own cycles, so rows that only fill a visit, rows that
two groups share and the imbalance of the cores are in it. The groups are drawn 25 times (Dirichlet
of concentration 4, then multinomial) and the row is the median. Nothing runs: waits for HBM are not
in it; with the first fetches, which every call pays once, the row says what it would be.

Peers by the same formula: jax.lax.ragged_dot, of which libtpu makes a kernel of its own forward and
for dx, and for dW a product of all rows for every group under a mask, whose windows of rows without
one of the group it skips; jax's megablox and, where it is installed, tokamax
(`launch.bench_tpu_peers`).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from launch import bench_tpu_peers
from launch.bench_row import Row, Wanted, measure_in_process
from moejax.aot import cycles, topology
from moejax.core.errors import InputError
from moejax.core.platform import compiling_for
from moejax.ops import tpu_tables, tpu_tiles, tpu_visits

TOPOLOGY, KIND = "v5p:2x2x1", "TPU v5"
NUM_ROWS, DEPTH, COLUMNS, NUM_GROUPS = 4096, 2048, 1408, 8
FLOPS_PER_CYCLE = 262_144  # of a chip, two cores
IDEAL = 2 * NUM_ROWS * DEPTH * COLUMNS / FLOPS_PER_CYCLE
NUM_DRAWS, CONCENTRATION = 25, 4.0
# product -> goal and ideal cycles
PRODUCTS = {
    "forward": (">= 0.90", IDEAL),
    "dx": (">= 0.88", IDEAL),
    "dW": (">= 0.85", IDEAL),
    "gate + up + activation": ("", 2 * IDEAL),
}


def rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """A row per product, and with `peer` one per product and peer."""
    for product, (goal, ideal) in PRODUCTS.items():
        figure = f"v5p {product} M4096 K2048 N1408 E8 bf16, ideal / static cycles"
        if not wanted(figure):
            continue
        count = _count("ours", product)
        totals = ours(product, count, draws())
        shares = [ideal / total for total in totals]
        started = [ideal / (total + count["start"]) for total in totals]
        best = None
        if peer:
            counted = ragged_dot(_count("ragged_dot", product), draws())
            best = statistics.median(ideal / total for total in counted)
        how = (
            f"{NUM_DRAWS} draws of groups: {min(shares):.3f} to {max(shares):.3f}; with the first "
            f"fetches {statistics.median(started):.3f}"
        )
        if product == "dW":
            whole, single, lean = dw_at_most(count, tiles(product).heights, draws())
            how += f"; at most {whole:.3f} by the matrix unit's 128 rows, {single:.3f} if each "
            how += f"group were one visit, {lean:.3f} if fetching cost those nothing besides"
        if peer:
            how += "; the peer without its copies of the weights"
        share = statistics.median(shares)
        yield Row(figure, share, "", goal, best, "ragged_dot" * peer, how)
        if peer and product in ("forward", "dx", "dW"):
            for name in bench_tpu_peers.PEERS:
                yield _beside(name, product, figure, share, ideal)


def _beside(name: str, product: str, figure: str, share: float, ideal: float) -> Row:
    """Our share beside that of a kernel of the peer's, in the best of a few tilings."""
    figure = f"{figure}, against {name}"
    try:
        if reason := bench_tpu_peers.lacks(name):
            raise InputError(reason)
        counted = _measure("launch.bench_megablox", name, product)
    except InputError as error:
        return Row(figure, share, "", peer_name=name, how=f"not measured: {error}")
    found = {}
    for one in counted["tilings"]:
        totals = bench_tpu_peers.totals(one, product, NUM_GROUPS)
        tiling = "x".join(map(str, one["tiling"]))
        found[tiling] = statistics.median(ideal / total for total in totals)
    best = max(found.values())
    shares = ", ".join(f"{tiling} {each:.3f}" for tiling, each in found.items())
    cores = "" if bench_tpu_peers.PEERS[name].cores == 2 else "; as it is made, on one core"
    how = f"{name} of {bench_tpu_peers.PEERS[name].package} {counted['version']}, tiles {shares}"
    return Row(figure, share, "", "", best, name, f"{how}; grid made static{cores}")


def draws() -> list[np.ndarray]:
    """The group sizes that the figure is a median over."""
    rng = np.random.default_rng(0)
    shares = (rng.dirichlet(np.full(NUM_GROUPS, CONCENTRATION)) for _ in range(NUM_DRAWS))
    return [rng.multinomial(NUM_ROWS, share) for share in shares]


def _count(who: str, product: str) -> dict[str, Any]:
    # XLA's cost model has that product; a dump of its schedule would take 8 GB.
    dumped = (who, product) != ("ragged_dot", "dW")
    return _measure("launch.bench_tpu_count", who, product, dumped=dumped)


def _measure(module: str, *arguments: str, dumped: bool = True) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        environment = topology.environment(TOPOLOGY)
        environment |= cycles.environment(folder) if dumped else {}
        return measure_in_process(module, *arguments, environment=environment, timeout_s=3600)


def ragged_dot(count: dict[str, float], drawn: Sequence[np.ndarray]) -> list[float]:
    """Cycles per draw: a visit for each group and tile of rows that holds one of its rows."""
    return [count["rest"] + count["visit"] * visits(sizes, int(count["rows"])) for sizes in drawn]


def visits(sizes: np.ndarray, rows: int, wanted: np.ndarray | None = None) -> int:
    """Tiles of `rows` rows that groups touch, a tile of two groups twice; of wanted groups only."""
    ends = np.cumsum(sizes)
    starts = ends - sizes
    each = np.where(sizes > 0, (ends - 1) // rows - starts // rows + 1, 0)
    return int(each.sum() if wanted is None else each[wanted].sum())


def ours(product: str, count: dict[str, Any], drawn: Sequence[np.ndarray]) -> list[float]:
    """Cycles of the busier core, per draw: each of its visits at the cost of its kind."""
    costs = np.asarray(count["visits"])
    return [max(costs[kinds].sum() for kinds in kinds_of(product, sizes)) for sizes in drawn]


def dw_at_most(
    count: dict[str, Any], heights: Sequence[int], drawn: Sequence[np.ndarray]
) -> tuple[float, float, float]:
    """Bounds of dW's share, medians: rows rounded up alone; a visit per group, however tall; and
    one that pays nothing for the pipeline around it (a visit that computes nothing pays that only).

    A matrix unit sums 128 rows at a time. What a visit costs is taken as a part per row and a part
    per visit, from its tallest and its lowest height.
    """
    visits = count["visits"]
    per_row = (visits[0] - visits[len(heights) - 1]) / (heights[0] - heights[-1])
    per_visit = visits[0] - per_row * heights[0]
    padded = [-(-sizes // 128) * 128 for sizes in drawn]
    whole = statistics.median(NUM_ROWS / rows.sum() for rows in padded)

    def one_each(cost: float) -> float:
        totals = (np.sum(cost + per_row * rows[rows > 0]) for rows in padded)
        return statistics.median(IDEAL / total for total in totals)

    return whole, one_each(per_visit), one_each(per_visit - count["idle"])


def kinds_of(product: str, sizes: np.ndarray) -> list[np.ndarray]:
    """The kinds of the visits of each core, as the kernels' own tables have them."""
    heights = tiles(product).heights
    wanted = tpu_visits.Wanted(product == "dW", NUM_ROWS, heights)
    visits = tpu_tables.visits(jnp.asarray(sizes), wanted)
    kinds = [visits.kind[core, :num] for core, num in enumerate(visits.num)]
    if product == "dW":
        groups = visits.group[0, : visits.num[0]]
        later = (kinds[0] == len(heights)) & (np.diff(groups, prepend=-1) == 0)
        kinds[0][later] += 1  # a group's second visit, and so on
    return kinds


def tiles(product: str) -> Any:
    """What the kernels take on a v5p."""
    with compiling_for("tpu", KIND):
        if product == "dW":
            tpu_tiles.outer_tiles.cache_clear()
            return tpu_tiles.outer_tiles(DEPTH, COLUMNS, jnp.dtype("bfloat16"))
        shape = (COLUMNS, DEPTH) if product == "dx" else (DEPTH, COLUMNS)
        count = tpu_tiles.Operands(1, 2, 2, 1) if product.startswith("gate") else ()
        count = count or tpu_tiles.Operands()
        rows_per_group = NUM_ROWS // NUM_GROUPS
        return tpu_tiles.rows_tiles(rows_per_group, *shape, jnp.dtype("bfloat16"), count)
