"""What a compiled program's text costs: matrix FLOPs and memory traffic, loops times their trips.

XLA's own `cost_analysis` counts the body of a loop once, and a step is a scan over layers. Here a
computation counts as often as it runs: a loop's trips are read from its condition (a counter less
than a constant), a branch of a conditional counts its share. A loop whose end depends on data is
counted once and reported, but further rounds of the expert exchange, which a balanced load does not
need, not at all. Only matrix products count as FLOPs.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict

import numpy as np

from moejax.aot.hlo import KINDS, Instruction, Program, shape_bytes
from moejax.aot.kernels import Array, kernel_flops
from moejax.moe.chunked import BALANCED

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
_FREE |= {"call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier"}
_PASS = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")
_TYPED = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
# Custom calls that run a kernel of ours or of JAX.
KERNELS = {"tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2"}
_ALLOCATES = 'custom_call_target="AllocateBuffer"'  # room that nothing is written to yet
_ARRAY = re.compile(r"\b[a-z]+\d*[a-z0-9]*\[([\d,]*)\]")
_ELSEWHERE = re.compile(r"\bS\([1-9]")  # a layout in the chip's own memory, or the host's


@dataclasses.dataclass(frozen=True)
class Cost:
    """One device's run of the program.

    flops: of matrix products. traffic_bytes: read from and written to HBM. runs: how often each
    computation runs. open_loops: loops whose trips depend on data, counted once each.
    unknown_kernels: names of kernels whose FLOPs are not known, and left out. launched: of each
    fusion, kernel and operation that a device runs one after another, how often it does, its FLOPs
    and its traffic; what runs beside others, as a copy that is awaited later, is not among them.
    """

    flops: float
    traffic_bytes: float
    runs: dict[str, float]
    open_loops: int
    unknown_kernels: tuple[str, ...] = ()
    launched: tuple[tuple[float, float, float], ...] = ()


def cost(program: Program) -> Cost:
    """Counts a parsed program (`moejax.aot.hlo.parse`)."""
    runs, open_loops = count_runs(program)
    inner = _inside_fusions(program)
    unknown: list[str] = []
    own: dict[str, list[float]] = {}  # FLOPs of each instruction of a computation that runs
    for name, instructions in program.items():
        if runs[name]:
            shapes = {i.name: i.shape for i in instructions}
            found = [_flops(instruction, shapes) for instruction in instructions]
            unknown += [i.name for i, each in zip(instructions, found, strict=True) if each is None]
            own[name] = [each or 0.0 for each in found]

    @functools.lru_cache
    def within(name: str) -> float:
        """FLOPs of a computation whose values stay on the chip, and of those that it calls."""
        called = (c for i in program.get(name, ()) for c in i.calls if c in inner)
        return sum(own.get(name, ())) + sum(map(within, called))

    traffic, launched = 0.0, []
    for name in own:
        if name in inner:
            continue
        shapes = {i.name: i.shape for i in program[name]}
        for instruction, flops in zip(program[name], own[name], strict=True):
            moved = _traffic(program, instruction, shapes)
            traffic += runs[name] * moved
            if instruction.opcode == "fusion":
                flops += sum(within(c) for c in instruction.calls if c in inner)
            opcode = instruction.opcode
            beside = opcode.endswith("-start") or opcode in KINDS
            if (flops or moved) and not beside:
                launched.append((runs[name], flops, moved))
    whole = sum(runs[name] * sum(each) for name, each in own.items())
    return Cost(whole, traffic, dict(runs), open_loops, tuple(unknown), tuple(launched))


def count_runs(program: Program) -> tuple[dict[str, float], int]:
    """How often each computation runs, and the number of loops with unknown trips."""
    called = {c for lines in program.values() for i in lines for c in i.calls}
    runs: dict[str, float] = defaultdict(float)
    open_loops: set[str] = set()

    def visit(name: str, times: float) -> None:
        runs[name] += times
        for instruction in program[name]:
            callees = [c for c in instruction.calls if c in program]
            each = times
            if instruction.opcode == "while":
                found = trips(program, name, instruction)
                if found is None:
                    open_loops.add(instruction.name)
                each = times * (1 if found is None else found)
            elif instruction.opcode == "conditional":
                each = times / max(1, len(callees))
            elif instruction.opcode in ("async-update", "async-done"):
                callees = []  # counted where it starts
            for callee in callees:
                visit(callee, each)

    for name in program:
        if name not in called:
            visit(name, 1.0)
    return runs, len(open_loops)


def trips(program: Program, computation: str, loop: Instruction) -> int | None:
    """How often a loop's body runs; None where that depends on data, but for exchanges: as a
    balanced load has them."""
    balanced = re.search(rf'{BALANCED}(\d+)/while"', loop.rest)
    if balanced:
        return int(balanced[1])
    known = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", loop.rest)
    lines = program.get(condition[1], []) if condition else []
    root = next((i for i in lines if i.is_root), None)
    while root is not None and root.opcode in _PASS:
        root = _find(lines, root.operands[0])
    if root is not None and root.opcode == "fusion" and root.calls:
        lines, root = _through_fusion(program, lines, root)
    if root is None or root.opcode != "compare" or len(root.operands) != 2:
        return None
    direction = re.search(r"direction=(\w+)", root.rest)
    names = list(root.operands)
    if direction is not None and direction[1] in ("GT", "GE"):
        names.reverse()
    start, end = (_limit(program, computation, loop, lines, name) for name in names)
    if end is None or start is None:
        return None
    more = direction is not None and direction[1] in ("LE", "GE")
    return max(0, -(-(end - start + more) // _step(program, loop, lines, names[0])))


def _step(program: Program, loop: Instruction, lines: list[Instruction], counter: str) -> int:
    """What one trip adds to the counter: an unrolled loop takes several at once."""
    at = _find(lines, counter)
    while at is not None and at.opcode in _PASS and at.operands:
        at = _find(lines, at.operands[0])
    index = re.search(r"index=(\d+)", at.rest) if at is not None else None
    body = re.search(r"body=%([\w.\-]+)", loop.rest)
    inside = program.get(body[1], []) if body else []
    root = next((i for i in inside if i.is_root and i.opcode == "tuple"), None)
    if index is None or root is None or int(index[1]) >= len(root.operands):
        return 1
    return _added(inside, root.operands[int(index[1])]) or 1


def _added(lines: list[Instruction], name: str) -> int:
    """The sum of the constants along a chain of additions."""
    at = _find(lines, name)
    while at is not None and at.opcode in _PASS and at.operands:
        at = _find(lines, at.operands[0])
    if at is None or at.opcode not in ("add", "constant"):
        return 0
    if at.opcode == "constant":
        return _constant(at) or 0
    return sum(_added(lines, operand) for operand in at.operands)


def _through_fusion(program: Program, lines: list[Instruction], fusion: Instruction):
    """The fusion's root with its parameters replaced by what they stand for outside."""
    inside = program.get(fusion.calls[0], [])
    root = next((i for i in inside if i.is_root), None)
    outer = {
        i.name: fusion.operands[int(index[1])]
        for i in inside
        if i.opcode == "parameter" and (index := re.match(r"(\d+)\)", i.rest))
    }
    if root is None:
        return lines, None
    operands = tuple(outer.get(name, name) for name in root.operands)
    return [*lines, *inside], dataclasses.replace(root, operands=operands)


def _limit(program: Program, computation: str, loop: Instruction, lines, name: str) -> int | None:
    """The integer that a value of the condition starts from: a constant, or the tuple's entry."""
    at = _find(lines, name)
    while at is not None and at.opcode in _PASS and at.operands:
        at = _find(lines, at.operands[0])
    if at is None:
        return None
    if at.opcode == "constant":
        return _constant(at)
    index = re.search(r"index=(\d+)", at.rest) if at.opcode == "get-tuple-element" else None
    if index is None:
        return None
    around = program[computation]
    entry = _find(around, loop.operands[0])
    if entry is None or entry.opcode != "tuple" or int(index[1]) >= len(entry.operands):
        return None
    value = _find(around, entry.operands[int(index[1])])
    while value is not None and value.opcode in _PASS and value.operands:
        value = _find(around, value.operands[0])
    return _constant(value) if value is not None and value.opcode == "constant" else None


def _constant(instruction: Instruction) -> int | None:
    found = re.match(r"(-?\d+)\)", instruction.rest)
    return int(found[1]) if found else None


def _find(lines: list[Instruction], name: str) -> Instruction | None:
    return next((i for i in lines if i.name == name), None)


def _dims(shape: str) -> tuple[int, ...]:
    found = _ARRAY.search(shape)
    return tuple(int(d) for d in found[1].split(",") if d) if found else ()


def _ints(pattern: str, rest: str) -> tuple[int, ...]:
    found = re.search(pattern, rest)
    return tuple(int(d) for d in re.findall(r"\d+", found[1])) if found else ()


def _arrays(shapes: list[str]) -> list[Array]:
    return [
        (dtype, tuple(int(d) for d in dims.split(",") if d))
        for shape in shapes
        for dtype, dims in _TYPED.findall(shape)
    ]


def _flops(instruction: Instruction, shapes: dict[str, str]) -> float | None:
    """Of one matrix product or kernel; None for a kernel that is not known."""
    rest = instruction.rest
    operands = [_dims(shapes.get(name, "")) for name in instruction.operands[:2]]
    if instruction.opcode == "dot":
        contracted = _ints(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
        return 2.0 * math.prod(_dims(instruction.shape)) * _picked(operands[0], contracted)
    if instruction.opcode == "convolution":
        return _convolution(instruction, *operands)
    if instruction.opcode != "custom-call":
        return 0.0
    estimated = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', rest)
    if estimated:
        return float(estimated[1])
    if any(call.startswith("__cublas") for call in instruction.calls):
        contracted = _ints(r'"lhs_contracting_dimensions":\[([^\]]*)\]', rest)
        return 2.0 * math.prod(_dims(instruction.shape)) * _picked(operands[0], contracted)
    if KERNELS & set(instruction.calls):
        taken = _arrays([shapes.get(name, "") for name in instruction.operands])
        # On a GPU the kernel's name is in the operation's alone.
        named = re.search(r'op_name="[^"]*/([^"/]*)/pallas_call"', rest)
        name = instruction.name + (f" {named[1]}" if named else "")
        return kernel_flops(name, taken, _arrays([instruction.shape]))
    return 0.0


def _picked(dims: tuple[int, ...], which: tuple[int, ...]) -> int:
    return math.prod(dims[i] for i in which)


def _convolution(instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """2 x outputs x input features x the window's places that lie on an element.

    TPUs write every matrix product as a convolution, batch dims as windows with holes.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    assert labels is not None, instruction.rest
    out = _dims(instruction.shape)
    pairs = zip(labels.groups(), (lhs, rhs, out), strict=True)
    sizes = [dict(zip(names, dims, strict=True)) for names, dims in pairs]
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    total = 2.0 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"]
    for dim in (name for name in labels[2] if name.isdigit()):
        place = int(dim)

        def field(name: str, default: str, place: int = place) -> list[int]:
            text = fields.get(name)
            return [int(n) for n in (text.split("x")[place] if text else default).split("_")]

        out_at = np.arange(sizes[2][dim])[:, None] * field("stride", "1")[0]
        window_at = np.arange(sizes[1][dim]) * field("rhs_dilate", "1")[0]
        at = out_at + window_at - field("pad", "0_0")[0]
        holes = field("lhs_dilate", "1")[0]
        total *= int(((at >= 0) & (at % holes == 0) & (at // holes < sizes[0][dim])).sum())
    return total


def _inside_fusions(program: Program) -> set[str]:
    """Computations whose values stay on the chip: those of fusions, and of reductions."""
    todo = [c for lines in program.values() for i in lines if i.opcode == "fusion" for c in i.calls]
    applied = (re.search(r"to_apply=%([\w.\-]+)", i.rest) for v in program.values() for i in v)
    todo += [found[1] for found in applied if found]
    inner: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in inner:
            inner.add(name)
            todo += [c for i in program.get(name, []) for c in i.calls]
    return inner


def _traffic(program: Program, instruction: Instruction, shapes: dict[str, str]) -> float:
    """HBM bytes of one scheduled instruction: operands it reads, results it writes."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or _ALLOCATES in instruction.rest:
        return 0.0
    inside = program.get(instruction.calls[0], []) if opcode == "fusion" else []
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _hbm_bytes(instruction.shape)
    if opcode == "dynamic-update-slice":
        return 2.0 * _hbm_bytes(shapes.get(instruction.operands[1], ""))
    if opcode in ("copy-start", "async-start") or opcode.endswith("-start"):
        return float(sum(_hbm_bytes(shapes.get(name, "")) for name in instruction.operands))
    reads = [shapes.get(name, "") for name in instruction.operands]
    if inside:
        operands = sum(_read_inside(inside, place, shape) for place, shape in enumerate(reads))
    else:
        operands = sum(map(_hbm_bytes, reads))
    written = _written_inside(inside) if inside else None
    return operands + (_hbm_bytes(instruction.shape) if written is None else written)


def _read_inside(inside: list[Instruction], place: int, shape: str) -> float:
    """Bytes that a fusion reads of an operand: only the slices it takes, if it only slices it."""
    whole = _hbm_bytes(shape)
    parameter = next(
        (i for i in inside if i.opcode == "parameter" and i.rest.startswith(f"{place})")), None
    )
    if parameter is None or not whole:
        return whole
    starts = _async_part(inside) == "AsyncCollectiveStart"
    total = 0.0
    for user in (i for i in inside if parameter.name in i.operands):
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += shape_bytes(user.shape)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue  # written in place
        elif user.is_root and (user.opcode == "tuple" or _async_part(inside)):
            continue  # carried along
        elif user.chain and not starts:
            continue  # read where the collective started
        else:
            return whole
    return min(whole, total)


def _written_inside(inside: list[Instruction]) -> float | None:
    """Bytes written by a fusion that updates slices in place or carries a collective along.

    None for every other one: what it returns.
    """
    root = next((i for i in inside if i.is_root), None)
    while root is not None and root.opcode in ("bitcast", "copy"):
        root = _find(inside, root.operands[0])
    if root is None:
        return None
    part = _async_part(inside)
    if part:  # all of the result is counted at the start
        chained = (i for i in inside if i.chain)
        return sum(_hbm_bytes(i.shape) for i in chained) if part.endswith("Start") else 0.0
    if root.opcode == "tuple":
        return sum(_written(inside, _find(inside, name)) for name in root.operands)
    return _written(inside, root) if root.opcode == "dynamic-update-slice" else None


def _written(inside: list[Instruction], result: Instruction | None) -> float:
    while result is not None and result.opcode == "bitcast":
        result = _find(inside, result.operands[0])
    if result is None or result.opcode == "parameter" or result.chain:
        return 0.0
    if result.opcode == "dynamic-update-slice":
        update = _find(inside, result.operands[1])
        return _hbm_bytes(result.shape) if update is None else float(shape_bytes(update.shape))
    return _hbm_bytes(result.shape)


def _async_part(inside: list[Instruction]) -> str:
    """Which end of a collective that runs beside fusions a fusion is; "" for those between."""
    root = next((i for i in inside if i.is_root), None)
    called = root.calls[-1] if root is not None and root.opcode == "custom-call" else ""
    return called if called.startswith("AsyncCollective") else ""


def _hbm_bytes(shape: str) -> float:
    """Bytes of a type that lie in HBM: those with another memory space in their layout do not."""
    if not _ELSEWHERE.search(shape):
        return float(shape_bytes(shape))
    parts = re.findall(r"[a-z]+\d*[a-z0-9]*\[[\d,]*\](?:\{[^{}]*\})?", shape)
    return float(sum(shape_bytes(part) for part in parts if not _ELSEWHERE.search(part)))
