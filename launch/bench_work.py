"""How many rows the layer's products go through for the rows there are, whatever the load.

The layer of `launch.bench_layer`, forward and backward: its own schedule on 8 devices, exchange by
exchange and round by round, and the TPU kernel's own visits of the groups that each exchange
brings. Eleven products per row where nine are the model's (gate and up are computed again), and
the rows that only fill a visit or that two groups share.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from launch.bench_row import Row
from moejax.core.platform import compiling_for
from moejax.moe import chunked
from moejax.moe.turns import turn
from moejax.ops import tpu_tables, tpu_tiles, tpu_visits

# Experts, shards, experts of a token, width, width of an expert, tokens of a device.
NUM_EXPERTS, SHARDS, TOP_K, WIDTH, FFN, NUM_TOKENS = 64, 8, 6, 2048, 1408, 4096
FACTOR = 1.25
# Products with rows on the left, and those summed over rows; of the model, three are again three.
ROW_PRODUCTS, SUMS, MODEL_PRODUCTS = 3 + 2 + 3, 3, 9
LOADS = {"balanced": "<= 1.30", "2x skew": "", "all to one": ""}
FIGURE = "layer chunked on 8 devices, rows multiplied / model's, {}"


def rows(wanted) -> Iterator[Row]:
    """A row for each load."""
    for load, goal in LOADS.items():
        figure = FIGURE.format(load)
        if wanted(figure):
            share, rounds = work(load)
            how = f"counted: {rounds} rounds beyond those of the parts; TPU v5p visits"
            yield Row(figure, share, "x", goal, how=how)


def choices(load: str) -> np.ndarray:
    """Experts [P, N, K], distinct per token: uniform, one shard's twice as likely, the first K."""
    if load == "all to one":
        return np.broadcast_to(np.arange(TOP_K), (SHARDS, NUM_TOKENS, TOP_K)).astype(np.int32)
    odds = np.ones(NUM_EXPERTS)
    if load == "2x skew":
        # Shard 0 gets twice the mean: K / P of a token's choices become 2 K / P.
        odds[: NUM_EXPERTS // SHARDS] = 2 * (SHARDS - 1) / (SHARDS - 2)
    drawn = np.random.default_rng(0).gumbel(size=(SHARDS, NUM_TOKENS, NUM_EXPERTS))
    order = np.argsort(-(drawn + np.log(odds)), axis=-1)
    return order[..., :TOP_K].astype(np.int32)


def work(load: str) -> tuple[float, int]:
    """Rows through products over rows of the model's, and rounds beyond the parts' own."""
    slots = chunked.slots_per_exchange(NUM_TOKENS, TOP_K, SHARDS, FACTOR)
    exchange = chunked.Exchange("expert", SHARDS, slots, True, jax.nn.silu, None)
    plan = functools.partial(
        chunked.schedule, num_experts=NUM_EXPERTS, exchange=exchange, axis_names=("expert",)
    )
    experts = jnp.asarray(choices(load))
    moves = jax.vmap(plan, axis_name="expert")(experts)
    num_turns = int(moves.num_turns[0])
    one = jax.jit(jax.vmap(lambda pairs, number: turn(pairs, number, slots).sizes_E, (0, None)))
    brought = [one(moves.pairs, number) for number in range(num_turns)]
    sizes = np.concatenate([np.asarray(each) for each in brought])  # [exchanges * P, E / P]
    assert sizes.sum() == experts.size, "a row travelled twice, or not at all"
    multiplied, summed = (np.sum(each) for each in _visited(sizes, SHARDS * slots))
    done = ROW_PRODUCTS * multiplied + SUMS * summed
    parts = moves.pairs.starts_QP.shape[1] - 1  # of each device
    return float(done / (MODEL_PRODUCTS * experts.size)), num_turns - parts


def _visited(sizes: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the visits of each exchange: of products with rows, and of sums over them."""
    dtype = jnp.dtype("bfloat16")
    with compiling_for("tpu", "TPU v5"):
        tpu_tiles.outer_tiles.cache_clear()
        tiles = tpu_tiles.rows_tiles(num_rows // sizes.shape[1], WIDTH, FFN, dtype)
        outer = tpu_tiles.outer_tiles(WIDTH, FFN, dtype)
        tpu_tiles.outer_tiles.cache_clear()
    padded = -(-num_rows // tpu_visits.BLOCK) * tpu_visits.BLOCK

    wanted = [tpu_visits.Wanted(False, padded, tiles.heights)]
    wanted.append(tpu_visits.Wanted(True, padded, outer.heights))
    # A group's earlier visits are of the tallest height, and of nothing there is no row.
    rows_of = [(*tiles.heights, 0), (*outer.heights, outer.heights[0], 0)]
    found = [
        [_rows(tpu_tables.visits(sizes_E, one), rows) for sizes_E in sizes]
        for one, rows in zip(wanted, rows_of, strict=True)
    ]
    return np.asarray(found[0]), np.asarray(found[1])


def _rows(visits: tpu_visits.Visits, heights: tuple[int, ...]) -> int:
    """Rows of all visits of one exchange, by the height of each kind."""
    kinds = [visits.kind[core, :num] for core, num in enumerate(visits.num)]
    return sum(heights[kind] for kind in np.concatenate(kinds))
