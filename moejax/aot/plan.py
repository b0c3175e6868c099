"""The plan of a training step on a topology: memory, work, traffic, time; what is compiled."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from moejax.aot import compile as aot
from moejax.aot import hlo, hlo_cost
from moejax.aot.estimate import Hbm, Setup, estimate, shard_bytes
from moejax.aot.roofline import Moved, Roofline, by_kind, roofline
from moejax.core.memory import GIB
from moejax.models import flops
from moejax.train.placement import StepProgram


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one update takes on one device, read from the compiled program.

    model_flops, compiled_flops: of one device and update. open_loops: loops whose trips depend on
    data, counted once. unknown_kernels: names of kernels whose FLOPs are left out. roofline, and
    with it tokens_per_s and mfu (model FLOPs over the chips' peak), are bounds that no run beats.
    They are None where the program did not compile for want of memory; hbm is then estimated, and
    required_bytes what the compiler asked for, refused its words where it does not say (a chip has
    other memories than HBM, which no setting of a run frees).
    """

    hbm: Hbm
    model_flops: float
    compiled_flops: float | None
    traffic_bytes: float | None
    moved: list[Moved]
    roofline: Roofline | None
    open_loops: int
    tokens_per_step: int
    tokens_per_s: float | None
    mfu: float | None
    compile_s: float
    required_bytes: int | None = None
    refused: str = ""
    unknown_kernels: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.required_bytes is None and self.hbm.left >= 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = dataclasses.asdict(self) | {"fits": self.fits}
        found["hbm"] |= {"used": self.hbm.used, "left": self.hbm.left}
        if self.roofline is not None:
            names = ("step_s", "in_turn_s", "one_by_one_s", "bound")
            found["roofline"] |= {name: getattr(self.roofline, name) for name in names}
        return found


def read_plan(
    program: StepProgram, compiled: Any, setup: Setup, compile_s: float, text: str | None = None
) -> Plan:
    """The plan of a compiled step."""
    text = compiled.as_text() if text is None else text
    cost = hlo_cost.cost(hlo.parse(text))
    moved = by_kind(hlo.collectives(text), cost.runs)
    found = roofline(cost.flops, cost.traffic_bytes, moved, setup.chip, cost.launched)
    tokens = setup.batch_size * setup.seq_len
    step_s = found.step_s
    model_flops = _model_flops(setup)
    return Plan(
        hbm=split_memory(program, aot.memory(compiled), setup),
        model_flops=model_flops,
        compiled_flops=cost.flops,
        traffic_bytes=cost.traffic_bytes,
        moved=moved,
        roofline=found,
        open_loops=cost.open_loops,
        tokens_per_step=tokens,
        tokens_per_s=tokens / step_s,
        mfu=model_flops / step_s / setup.chip.flops_per_s,
        compile_s=compile_s,
        unknown_kernels=cost.unknown_kernels,
    )


def failed_plan(setup: Setup, error: BaseException, compile_s: float) -> Plan:
    """The plan of a step that the compiler refused for want of memory."""
    asked = required_bytes(str(error))
    return Plan(
        hbm=estimate(setup),
        model_flops=_model_flops(setup),
        compiled_flops=None,
        traffic_bytes=None,
        moved=[],
        roofline=None,
        open_loops=0,
        tokens_per_step=setup.batch_size * setup.seq_len,
        tokens_per_s=None,
        mfu=None,
        compile_s=compile_s,
        required_bytes=asked or setup.chip.hbm_bytes + 1,
        refused="" if asked else " ".join(str(error).split())[:300],
    )


def required_bytes(message: str) -> int | None:
    """Bytes of HBM that a RESOURCE_EXHAUSTED of the compiler says it needs; None if it does not."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    found = found or re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
    if not found:
        return None
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))


def split_memory(program: StepProgram, memory: aot.Memory, setup: Setup) -> Hbm:
    """XLA's bytes by what holds them.

    Arguments are exact. Of the temporary bytes, gradients are the trained parameters' size and
    activations what the traced step keeps (both no more than there is); buffers are the rest.
    """
    params = shard_bytes(program.state.params) + shard_bytes(program.frozen)
    optimizer = shard_bytes(program.state.opt_state)
    kept = estimate(setup)
    trained = shard_bytes(program.state.params)
    share = trained / (trained + shard_bytes(program.frozen))  # what is frozen has no gradient
    temp = memory.total_bytes - memory.argument_bytes
    gradients = min(temp, round(share * kept.gradients))
    activations = min(temp - gradients, kept.activations)
    return Hbm(
        params=params,
        optimizer=optimizer,
        batch=memory.argument_bytes - params - optimizer,
        gradients=gradients,
        activations=activations,
        buffers=temp - gradients - activations,
        capacity=setup.chip.hbm_bytes,
        estimated=False,
    )


def describe(plan: Plan) -> list[str]:
    """The plan in lines."""
    return [*describe_hbm(plan.hbm), *_describe_work(plan)]


def describe_hbm(hbm: Hbm) -> list[str]:
    """The memory table, GiB per device."""
    how = "reckoned from shapes" if hbm.estimated else "as compiled"
    # The compiler gives one number for all that is temporary (`split_memory`).
    marks = {"gradients": "  reckoned", "activations": "  reckoned", "buffers": "  the rest"}
    marks = {} if hbm.estimated else marks
    lines = [f"HBM per device, GiB ({how})"]
    words = {
        "params": "parameters",
        "optimizer": "optimizer",
        "batch": "batch",
        "gradients": "gradients",
        "activations": "activations",
        "buffers": "buffers",
    }
    rows = [(word, getattr(hbm, name)) for name, word in words.items()]
    rows += [("used", hbm.used), ("there is", hbm.capacity)]
    rows += [("left", hbm.left)] if hbm.left >= 0 else [("too much", -hbm.left)]
    return lines + [f"  {word:<12}{value / GIB:10.2f}{marks.get(word, '')}" for word, value in rows]


def _describe_work(plan: Plan) -> list[str]:
    if plan.roofline is None:
        why = plan.refused or f"it needs {(plan.required_bytes or 0) / GIB:.2f} GiB"
        return [f"compiler refused: {why}; all below the table is unknown"]
    assert plan.compiled_flops is not None and plan.traffic_bytes is not None
    factor = plan.compiled_flops / plan.model_flops
    line = plan.roofline
    lines = [
        "per device and update",
        f"  model FLOPs     {plan.model_flops:10.3e}",
        f"  compiled FLOPs  {plan.compiled_flops:10.3e}   x {factor:.2f}: remat, padded rows; "
        "loops times their trips",
        f"  HBM traffic     {plan.traffic_bytes / 1e9:10.1f} GB",
        "  collective               runs   result GB   sent GB   overlapped",
    ]
    for row in plan.moved:
        share = row.overlapped_bytes / row.sent_bytes if row.sent_bytes else 0.0
        lines.append(
            f"    {row.kind:<20}{row.count:9,.0f}{row.result_bytes / 1e9:12.2f}"
            f"{row.sent_bytes / 1e9:10.2f}{share:13.0%}"
        )
    if plan.open_loops:
        lines.append(f"  {plan.open_loops} loop(s) whose end depends on data are counted once")
    if plan.unknown_kernels:
        names = ", ".join(sorted(set(plan.unknown_kernels))[:4])
        lines.append(f"  FLOPs of {len(plan.unknown_kernels)} kernel(s) are unknown: {names}")
    milliseconds = {
        "compute": line.compute_s,
        "HBM": line.memory_s,
        "network": line.network_s,
        "of which not overlapped": line.exposed_s,
    }
    parts = ", ".join(f"{name} {1e3 * value:.1f}" for name, value in milliseconds.items())
    lines += [
        f"roofline at peak rates, ms: {parts}",
        f"  {line.bound} bounds it: {1e3 * line.step_s:.1f} ms at least; "
        f"{1e3 * line.in_turn_s:.1f} ms if what is not overlapped waits its turn,",
        f"  {1e3 * line.one_by_one_s:.1f} ms if no fusion or kernel begins before the last has "
        "ended",
        f"  at most {plan.tokens_per_s:,.0f} tokens/s and {plan.mfu:.1%} MFU: upper bounds, "
        "not forecasts",
    ]
    return lines


def _model_flops(setup: Setup) -> float:
    num_tokens = setup.batch_size * setup.seq_len
    whole = flops.train_flops(setup.model, num_tokens, setup.seq_len, setup.freeze)
    return whole / setup.num_devices
