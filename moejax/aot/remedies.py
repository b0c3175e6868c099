"""What makes a training step fit, in the order in which to try it, each with its price."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from moejax.aot.estimate import Setup, estimate, estimate_time
from moejax.core.errors import InputError
from moejax.core.memory import GIB

MAX_TENSOR = 8
_REMAT = ("nothing", "dots", "full", "offload")


@dataclasses.dataclass(frozen=True)
class Remedy:
    """One change. keys: of a config, with their new values. cost: in words.

    used, time_factor: bytes per device and the least time of a step, over that before all changes,
    once this change and those before it are made. same_run: whether the training stays what it was
    (up to rounding).
    """

    keys: dict[str, Any]
    cost: str
    used: int
    fits: bool
    time_factor: float
    same_run: bool


@dataclasses.dataclass(frozen=True)
class _Change:
    setup: Setup
    keys: dict[str, Any]
    cost: str
    same_run: bool


def remedies(setup: Setup, required: int | None = None, limit: int = 8) -> list[Remedy]:
    """Changes to make one after the other until the step fits: the cheapest in time comes first.

    Those that leave the training as it is come before those that do not (another optimizer, fewer
    rows). required: bytes that the step was found to need; what the estimate misses of them is
    added to every other estimate. Empty if it fits, or if nothing is known to help.
    """
    first, first_s = estimate(setup), estimate_time(setup).step_s
    missed = 0 if required is None else required - first.used
    found: list[Remedy] = []
    used = first.used + missed
    while used > setup.chip.hbm_bytes and len(found) < limit:
        best = _cheapest(setup, used - missed, used - setup.chip.hbm_bytes)
        if best is None:
            return found
        setup = best.setup
        used = estimate(setup).used + missed
        factor = estimate_time(setup).step_s / first_s
        fits = used <= setup.chip.hbm_bytes
        found.append(Remedy(best.keys, best.cost, used, fits, factor, best.same_run))
    return found


def describe(found: list[Remedy], capacity: int) -> list[str]:
    """One line per remedy: what to pass, what it costs, where that leaves the memory."""
    lines = []
    for number, one in enumerate(found, 1):
        flags = " ".join(f"--config.{key}={value}" for key, value in one.keys.items())
        other = "" if one.same_run else "; changes the training"
        state = "fits" if one.fits else "still too much"
        lines.append(
            f"{number}. {flags}: {one.cost}{other}. About {one.used / GIB:.1f} of "
            f"{capacity / GIB:.1f} GiB ({state}), least time x {one.time_factor:.2f}"
        )
    return lines


def _cheapest(setup: Setup, used: int, excess: int) -> _Change | None:
    """Of the changes that keep the run, if any does: the fastest that is enough by itself.

    If none is enough, the one that costs the least time per byte saved.
    """
    rated: list[tuple[bool, bool, float, int, _Change]] = []
    now_s = estimate_time(setup).step_s
    for change in _changes(setup):
        try:
            saved = used - estimate(change.setup).used
            extra_s = estimate_time(change.setup).step_s - now_s
        except InputError:  # a size does not divide by that mesh
            continue
        if saved > 0.01 * used:
            enough = saved >= excess
            price = extra_s if enough else extra_s / saved
            rated.append((not change.same_run, not enough, price, len(rated), change))
    return min(rated)[-1] if rated else None


def _changes(setup: Setup) -> Iterator[_Change]:
    """Every single change to a setup, whether it helps or not."""
    mesh, rows = dict(setup.mesh), setup.batch_size // setup.accumulation
    if mesh["data"] > 1:
        sizes = {**mesh, "data": 1, "fsdp": mesh["data"] * mesh["fsdp"]}
        cost = "weights are gathered over more devices"
        yield _with_mesh(setup, sizes, cost)
    for factor in (2, 4, 8, 16, 32, 64):
        if rows % factor or (rows // factor) % setup.token_parts:
            break
        parts = factor * setup.accumulation
        cost = f"{parts} passes over the weights, and a {setup.accumulation_dtype} sum of gradients"
        changed = dataclasses.replace(setup, accumulation=parts)
        yield _Change(changed, {"train.accumulation": parts}, cost, True)
    remat = "nothing" if setup.remat == "none" else setup.remat
    # Block inputs leave the device only when nothing else is kept on it.
    last = len(_REMAT) if remat == "full" else _REMAT.index("full") + 1
    for stronger in _REMAT[_REMAT.index(remat) + 1 : last]:
        what = {
            "dots": "all but matrix products is computed twice",
            "full": "the forward pass is computed twice, about a third more FLOPs",
            "offload": "block inputs travel to the host and back",
        }[stronger]
        changed = dataclasses.replace(setup, remat=stronger)
        yield _Change(changed, {"compute.remat": stronger}, what, True)
    for size in (setup.max_logit_mib // 4, setup.max_logit_mib // 16):
        if size >= 1 and setup.logit_bytes > size * 2**20:
            cost = "the head's product is computed twice, in smaller chunks"
            changed = dataclasses.replace(setup, max_logit_mib=size)
            yield _Change(changed, {"compute.max_logit_mib": size}, cost, True)
    tensor = 2 * mesh["tensor"]
    giver = next((axis for axis in ("data", "fsdp") if mesh[axis] % 2 == 0), None)
    if giver and tensor <= MAX_TENSOR and rows % (setup.token_parts // 2) == 0:
        sizes = {**mesh, "tensor": tensor, giver: mesh[giver] // 2}
        yield _with_mesh(setup, sizes, "activations are summed twice in every block and pass")
    yield from _other_runs(setup, rows)


def _with_mesh(setup: Setup, sizes: dict[str, int], cost: str) -> _Change:
    keys = {f"mesh.{axis}": size for axis, size in sizes.items() if size != setup.mesh[axis]}
    return _Change(dataclasses.replace(setup, mesh=sizes), keys, cost, True)


def _other_runs(setup: Setup, rows: int) -> Iterator[_Change]:
    """Changes after which it is another training run."""
    if setup.optim.name == "adamw":
        optim = dataclasses.replace(setup.optim, name="adafactor")
        cost = "no momentum, and factored second moments: tune the learning rate again"
        changed = dataclasses.replace(setup, optim=optim)
        yield _Change(changed, {"train.optimizer": "adafactor"}, cost, False)
    if setup.accumulation > 1 and setup.accumulation_dtype == "float32":
        changed = dataclasses.replace(setup, accumulation_dtype="bfloat16")
        cost = "the sum of gradients is rounded to 8 bits with every part"
        yield _Change(changed, {"train.accumulation_dtype": "bfloat16"}, cost, False)
    if setup.param_dtype == "float32":
        changed = dataclasses.replace(setup, param_dtype="bfloat16")
        cost = "small updates are lost to rounding"
        yield _Change(changed, {"model.dtype": "bfloat16"}, cost, False)
    if rows % 2 == 0 and (rows // 2) % setup.token_parts == 0:
        size = setup.batch_size // 2
        changed = dataclasses.replace(setup, batch_size=size)
        yield _Change(changed, {"train.batch_size": size}, "half the rows per update", False)
    if setup.seq_len >= 256:
        size = setup.seq_len // 2
        changed = dataclasses.replace(setup, seq_len=size)
        yield _Change(changed, {"data.seq_len": size}, "longer texts are cut", False)


def least_devices(setup: Setup) -> int:
    """How many devices share the state so that it alone fits, gradients included."""
    found = estimate(setup)
    whole = (found.params + found.optimizer + found.gradients) * setup.num_devices
    return max(1, -(-whole // setup.chip.hbm_bytes))
