"""Which way tokens should travel to their experts: a cost model, and its reasons."""

import dataclasses

from moejax.core.chips import CHIPS
from moejax.core.errors import InputError

STRATEGIES = ("local", "all_gather", "capacity", "chunked")
# Time before the first byte of a collective arrives; the model's one guess, not measured.
LATENCY_S = 1e-5


@dataclasses.dataclass(frozen=True)
class Load:
    """One device's share of a layer: tokens, choices per token, expert shards, widths."""

    tokens: int
    top_k: int
    shards: int
    d_model: int
    d_ff: int
    bytes_per_number: int = 2


@dataclasses.dataclass(frozen=True)
class Choice:
    """strategy and why; per candidate the bytes a device receives and the seconds of exchange."""

    strategy: str
    reason: str
    received_bytes: dict[str, int]
    exchange_s: dict[str, float]


def choose(load: Load, chip: str = "v5p") -> Choice:
    """The exact strategy with the least estimated time of a forward pass.

    all_gather receives (P - 1) N rows and as many partial sums, in 2 collectives; chunked, at
    balanced load, 1.25 N K (P - 1) / P rows each way, in 4 (two halves). "capacity" drops tokens
    and is only used when asked for. "local" where there is one shard.
    """
    if chip not in CHIPS:
        raise InputError(f"chip {chip!r} is none of the {len(CHIPS)} known: {', '.join(CHIPS)}.")
    if load.shards == 1:
        return Choice("local", "1 expert shard: nothing to exchange", {"local": 0}, {"local": 0.0})
    row = load.d_model * load.bytes_per_number
    others = load.shards - 1
    pairs = load.tokens * load.top_k
    received = {
        "all_gather": 2 * others * load.tokens * row,
        "chunked": round(2 * 1.25 * pairs * row * others / load.shards),
    }
    calls = {"all_gather": 2, "chunked": 4}
    rate = CHIPS[chip].link_bytes_per_s
    seconds = {name: calls[name] * LATENCY_S + received[name] / rate for name in received}
    best = min(seconds, key=seconds.__getitem__)
    reason = (
        f"{load.tokens} tokens x top-{load.top_k} over {load.shards} expert shards on {chip}: "
        + ", ".join(f"{n} {received[n]:,} B in {1e6 * seconds[n]:.1f} us" for n in sorted(seconds))
    )
    return Choice(best, reason, received, seconds)
