"""Which way tokens should travel to their experts: a cost model, and its reasons."""

import dataclasses
import math
from collections.abc import Mapping

from moejax.core.chips import CHIPS, Chip
from moejax.core.errors import InputError
from moejax.core.mesh import TOKEN_AXES
from moejax.moe.config import MoEConfig

STRATEGIES = ("local", "all_gather", "capacity", "ragged", "chunked")


# Time before the first byte of a collective arrives; the model's one guess, not measured.
LATENCY_S = 1e-5
# Of a device's memory, what one layer's rows may take.
MEMORY_SHARE = 1 / 32


# How often a number that is kept is written or read: into its turn's place and into the stack of a
# scan over layers, and out of both. In the plan of the 8 x 1.3B for v5p it is 6; memory that does
# not reach its peak rate makes it more.
PASSES_KEPT = 8


@dataclasses.dataclass(frozen=True)
class Load:
    """One device's share of a layer: tokens, choices per token, expert shards, widths.

    experts_per_shard bounds how many rows of one token a shard may get.
    """

    tokens: int
    top_k: int
    shards: int
    d_model: int
    d_ff: int
    bytes_per_number: int = 2
    experts_per_shard: int = 8


def load_of(
    config: MoEConfig, sizes: Mapping[str, int], x_shape: tuple[int, int, int], d_ff: int
) -> Load:
    """The load of a layer with inputs [B, T, D] in bfloat16 on a mesh of these sizes."""
    num_rows, length, d_model = x_shape
    parts, shards = math.prod(sizes[axis] for axis in TOKEN_AXES), sizes["expert"]
    return Load(
        tokens=max(1, num_rows * length // parts),
        top_k=config.routed_per_token,
        shards=shards,
        d_model=d_model,
        d_ff=d_ff,
        experts_per_shard=max(1, config.num_experts // shards),
    )


def worth_keeping(chip: Chip | None, d_model: int, d_ff: int, bytes_per_number: int = 2) -> bool:
    """Whether a row of an exchange is kept sooner than its two products of D x F are made again.

    Kept are x, gate and up, D + 2 F numbers. d_ff: F on one device. A chip that is not known is
    taken to compute slowly, as a CPU does.
    """
    if chip is None:
        return True
    moved = PASSES_KEPT * (d_model + 2 * d_ff) * bytes_per_number / chip.hbm_bytes_per_s
    return 4 * d_model * d_ff / chip.flops_per_s > moved


@dataclasses.dataclass(frozen=True)
class Choice:
    """strategy and why; per candidate what a device receives, the seconds, the rows' memory."""

    strategy: str
    reason: str
    received_bytes: dict[str, int]
    seconds: dict[str, float]
    memory_bytes: dict[str, int]


def choose(load: Load, chip: str = "v5p") -> Choice:
    """The exact strategy with the least estimated time of a forward pass among those that fit.

    Time is latency + bytes received / link + bytes of rows written and read / memory speed. Of
    N tokens, K choices, P shards, with r = P N min(K, experts per shard) rows at worst:
      all_gather  receives (P - 1) N rows and as many partial sums, handles r
      ragged      receives N K (P - 1) / P rows each way, handles r
      chunked     receives 1.25 times that, handles 1.25 N K, and has 2 of 6 parts at a time
    Memory counts 2 D + 3 F numbers a row, for the backward pass; a strategy may take 1/32 of the
    device's, else the one that takes least is chosen. The products are the same for all. "capacity"
    drops tokens and is only used when asked for; "local" where there is one shard.
    """
    if chip not in CHIPS:
        raise InputError(f"chip {chip!r} is none of the {len(CHIPS)} known: {', '.join(CHIPS)}.")
    if load.shards == 1:
        why = "1 expert shard: nothing to exchange"
        return Choice("local", why, {"local": 0}, {"local": 0.0}, {"local": 0})
    speed = CHIPS[chip]
    row, others = load.d_model * load.bytes_per_number, load.shards - 1
    pairs = load.tokens * load.top_k
    worst = load.shards * load.tokens * min(load.top_k, load.experts_per_shard)
    both_ways = 2 * pairs * row * others / load.shards
    received = {
        "all_gather": 2 * others * load.tokens * row,
        "ragged": round(both_ways),
        "chunked": round(1.25 * both_ways),
    }
    rows = {"all_gather": worst, "ragged": worst, "chunked": 1.25 * pairs}
    calls = {"all_gather": 4, "ragged": 5, "chunked": 6}
    per_row = (2 * load.d_model + 3 * load.d_ff) * load.bytes_per_number
    held = {"all_gather": 1.0, "ragged": 1.0, "chunked": 2 / 6}
    memory = {name: round(rows[name] * per_row * held[name]) for name in rows}
    seconds = {
        name: calls[name] * LATENCY_S
        + received[name] / speed.link_bytes_per_s
        + 2 * rows[name] * per_row / speed.hbm_bytes_per_s
        for name in rows
    }
    room = speed.hbm_bytes * MEMORY_SHARE
    fitting = [name for name in rows if memory[name] <= room]
    if fitting:
        best = min(fitting, key=seconds.__getitem__)
    else:
        best = min(memory, key=memory.__getitem__)
    told = (
        f"{name} {1e6 * seconds[name]:.0f} us, receives {received[name] / 1e6:,.1f} MB, rows take "
        f"{memory[name] / 1e6:,.0f} MB" + ("" if name in fitting else " (too much)")
        for name in sorted(seconds, key=seconds.__getitem__)
    )
    reason = (
        f"{best}: {load.tokens} tokens x top-{load.top_k} over {load.shards} expert shards on "
        f"{chip}, where a layer's rows may take {room / 1e6:,.0f} MB: " + "; ".join(told)
    )
    return Choice(best, reason, received, seconds, memory)
