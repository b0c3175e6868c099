"""The least time a compiled program can take on a chip, and what sets it."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping

from moejax.aot.hlo import Collective
from moejax.core.chips import Chip


@dataclasses.dataclass(frozen=True)
class Moved:
    """Collectives of one kind in one run of the program, on one device.

    count: how often one runs. result_bytes: what they leave behind. sent_bytes: over this device's
    links. overlapped_bytes: of those, sent while a matrix product is scheduled.
    """

    kind: str
    count: float
    result_bytes: float
    sent_bytes: float
    overlapped_bytes: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds each resource needs at its peak rate.

    exposed_s: of network_s, the collectives that no matrix product overlaps. The program takes at
    least `step_s`, the largest; `in_turn_s` if exposed collectives wait for everything else.
    launched_s: each fusion and kernel alone, by what it takes longest for; `one_by_one_s` if none
    begins before the last has ended, as on a TPU they do but for what is fetched ahead; 0 where the
    program's are not known.
    """

    compute_s: float
    memory_s: float
    network_s: float
    exposed_s: float
    launched_s: float = 0.0

    @property
    def one_by_one_s(self) -> float:
        return self.launched_s and max(self.launched_s + self.exposed_s, self.in_turn_s)

    @property
    def step_s(self) -> float:
        return max(self.compute_s, self.memory_s, self.network_s)

    @property
    def in_turn_s(self) -> float:
        hidden = self.network_s - self.exposed_s
        return max(self.compute_s, self.memory_s, hidden) + self.exposed_s

    @property
    def bound(self) -> str:
        names = {"compute": self.compute_s, "HBM": self.memory_s, "network": self.network_s}
        return max(names, key=names.__getitem__)


def sent_bytes(kind: str, result_bytes: float, participants: int) -> float:
    """Bytes one of n devices sends, by the best known schedule, for a result of R bytes.

    all-gather and all-to-all (n - 1) / n R; reduce-scatter (n - 1) R; all-reduce, which is the two
    one after the other, 2 (n - 1) / n R; a permutation R. Unknown n counts as many.
    """
    others = 1.0 if participants == 0 else (participants - 1) / participants
    if kind == "all-reduce":
        return 2 * others * result_bytes
    if kind == "reduce-scatter":
        return max(0, participants - 1) * result_bytes
    if kind in ("collective-permute", "collective-broadcast"):
        return result_bytes
    return others * result_bytes


def by_kind(found: Iterable[Collective], runs: Mapping[str, float]) -> list[Moved]:
    """Sums over the collectives of a program, each as often as its computation runs."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for one in found:
        times = runs.get(one.computation, 0.0)
        sent = times * sent_bytes(one.kind, one.bytes, one.participants)
        row = (times, times * one.bytes, sent, sent if one.with_matmul else 0.0)
        sums[one.kind] = [a + b for a, b in zip(sums[one.kind], row, strict=True)]
    rows = [Moved(kind, *values) for kind, values in sums.items() if values[0]]
    return sorted(rows, key=lambda row: -row.sent_bytes)


def roofline(
    flops: float,
    traffic_bytes: float,
    moved: Iterable[Moved],
    chip: Chip,
    launched: Iterable[tuple[float, float, float]] = (),
) -> Roofline:
    """Peak rates throughout, all links at once: a bound that no run beats, not a forecast.

    launched: as `moejax.aot.hlo_cost.Cost` has it.
    """
    rows = list(moved)
    sent = sum(row.sent_bytes for row in rows)
    exposed = sum(row.sent_bytes - row.overlapped_bytes for row in rows)
    return Roofline(
        compute_s=flops / chip.flops_per_s,
        memory_s=traffic_bytes / chip.hbm_bytes_per_s,
        network_s=sent / chip.link_bytes_per_s,
        exposed_s=exposed / chip.link_bytes_per_s,
        launched_s=sum(
            runs * max(done / chip.flops_per_s, took / chip.hbm_bytes_per_s)
            for runs, done, took in launched
        ),
    )
