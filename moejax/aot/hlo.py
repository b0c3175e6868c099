"""Reads a compiled program's text: which collectives it runs and what runs meanwhile.

`Compiled.as_text()` prints computations in the order of the schedule. A collective stands there as
one instruction (nothing runs meanwhile), as a pair KIND-start, KIND-done, as async-start and
async-done around a computation, or, on a TPU, as fusions that share a `chain_id`: the first starts
it, the last awaits it and those in between carry it along with work of their own. A reduce-scatter
of a TPU is a fusion of an all-reduce and the slice that a device keeps; only its name says so.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = (
    "ragged-all-to-all",
    "all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "token": 0, "bf16": 16, "u4": 4, "s4": 4, "c64": 64, "c128": 128}
_MATMUL_TARGETS = {
    "tpu_custom_call",
    "__gpu$xla.gpu.triton",
    "mosaic_gpu_v2",
    "__cublas$gemm",
    "__cublas$lt$matmul",
}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_HEAD = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|condition)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_CHAIN = re.compile(r'chain_id="(\w+)"')
_SCATTER = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    calls: the computations it names and the target of a custom call. chain: its chain_id or ''.
    rest: the line from the operands on, after the bracket. is_root: whether its computation
        returns it.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    chain: str
    rest: str = ""
    is_root: bool = False


@dataclasses.dataclass(frozen=True)
class Collective:
    """kind: of KINDS. bytes: of its result on one device. between: what is scheduled while it runs.

    computation: the one it stands in, in_loop: whether that is run by a loop, with_matmul: whether
    a matrix product is among `between`. scope: the named scopes of the source that it comes from.
    """

    kind: str
    name: str
    bytes: int
    participants: int
    is_async: bool
    between: tuple[Instruction, ...]
    with_matmul: bool
    computation: str
    in_loop: bool
    scope: str = ""


Program = dict[str, list[Instruction]]


def parse(text: str) -> Program:
    """Computation name -> its instructions in the order of the text."""
    program: Program = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        opened = _COMPUTATION.match(line)
        if opened:
            current = program.setdefault(opened[1], [])
        elif _HEAD.match(line):
            current.append(_instruction(line))
    return program


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program's text, each pair of start and done once."""
    program = parse(text)
    loops = _reached_from_loops(program)
    inside = _called_by_fusion_or_async(program)
    found = []
    for computation, instructions in program.items():
        if computation in inside:
            continue  # counted where the fusion, or the async pair, stands
        for first, last, source, shape in _spans(program, instructions):
            start = instructions[first]
            between = tuple(instructions[first + 1 : last])
            found.append(
                Collective(
                    kind=source.opcode.removesuffix("-start"),
                    name=start.name,
                    bytes=shape_bytes(shape),
                    participants=_participants(source.rest),
                    is_async=last > first,
                    between=between,
                    with_matmul=any(has_matmul(program, i) for i in between),
                    computation=computation,
                    in_loop=computation in loops,
                    scope=_scope(source.rest) or _scope(start.rest),
                )
            )
    return found


def _scope(rest: str) -> str:
    named = re.search(r'op_name="([^"]*)"', rest)
    return named[1] if named else ""


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays in a type as HLO writes it: 'bf16[8,128]{1,0}' or a tuple of such."""
    bits = 0
    for dtype, dims in _SHAPE.findall(shape):
        width = re.search(r"\d+", dtype)  # f32, s8; f8e4m3fn too
        bits_each = _BITS.get(dtype, int(width[0]) if width else 0)
        bits += bits_each * math.prod(int(d) for d in dims.split(",") if d)
    return bits // 8


def has_matmul(program: Program, instruction: Instruction) -> bool:
    """Whether it is, or calls, a matrix product: dot, convolution, cuBLAS or a Pallas kernel."""
    if instruction.opcode in ("dot", "convolution", "ragged-dot"):
        return True
    if instruction.opcode == "custom-call" and _MATMUL_TARGETS & set(instruction.calls):
        return True
    return any(has_matmul(program, i) for name in instruction.calls for i in program.get(name, []))


def _instruction(line: str) -> Instruction:
    head = _HEAD.match(line)
    assert head is not None
    rest = line[head.end() :]
    # The type may hold spaces (a tuple) and comments; the opcode is the first word with a bracket.
    opcode = _OPCODE.search(" " + rest)
    assert opcode is not None, line
    shape = rest[: max(0, opcode.start() - 1)]
    after = rest[opcode.end() - 1 :]
    calls = list(_CALLS.findall(after))
    for branches in _BRANCHES.findall(after):
        calls += re.findall(r"%([\w.\-]+)", branches)
    calls += re.findall(r'custom_call_target="([^"]+)"', after)
    chain = _CHAIN.search(after)
    return Instruction(
        name=head[2],
        opcode=opcode[1],
        shape=shape,
        operands=tuple(re.findall(r"%([\w.\-]+)", after.partition(")")[0])),
        calls=tuple(calls),
        chain=chain[1] if chain else "",
        rest=after,
        is_root=bool(head[1]),
    )


def _spans(
    program: Program, instructions: list[Instruction]
) -> Iterator[tuple[int, int, Instruction, str]]:
    """(place of the start, of the done, the collective itself, type of the result) of each."""
    done = {i.operands[0]: n for n, i in enumerate(instructions) if i.opcode.endswith("-done")}
    chains: dict[str, tuple[int, int, Instruction, str]] = {}
    for place, instruction in enumerate(instructions):
        opcode = instruction.opcode
        if opcode in KINDS:
            yield place, place, instruction, instruction.shape
        elif opcode.removesuffix("-start") in KINDS and instruction.name in done:
            last = _last_done(instructions, done, place)
            yield place, last, instruction, instructions[last].shape
        elif opcode == "async-start":
            inner = _collectives_in(program, instruction)
            if inner:
                last = _last_done(instructions, done, place)
                yield place, last, inner[0], instructions[last].shape
        elif opcode == "fusion":
            scatters = any(name.startswith(_SCATTER) for name in instruction.calls)
            for inner_one in _collectives_in(program, instruction):
                chain = inner_one.chain or instruction.name
                first = chains[chain][0] if chain in chains else place
                if scatters:
                    kept = instruction.shape
                    inner_one = dataclasses.replace(inner_one, opcode="reduce-scatter", shape=kept)
                chains[chain] = (first, place, inner_one, inner_one.shape)
    yield from chains.values()


def _participants(rest: str) -> int:
    """Devices of one replica group, in each of the ways they are written; 0 if they are not."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    if iota:
        return int(iota[1])
    named = re.search(r"replica_groups=\w+\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        used = re.findall(r"'(\w+)'", named[2])
        return math.prod(int(sizes[axis]) for axis in used if axis in sizes)
    return 0


def _last_done(instructions: list[Instruction], done: dict[str, int], place: int) -> int:
    """Where a started collective is awaited, through any async-update in between."""
    name = instructions[place].name
    while name not in done:
        updates = (i for i in instructions if i.opcode == "async-update")
        name = next(i.name for i in updates if name in i.operands)
    return done[name]


def _collectives_in(program: Program, instruction: Instruction) -> list[Instruction]:
    found = []
    for name in instruction.calls:
        for inner in program.get(name, []):
            if inner.opcode in KINDS:
                found.append(inner)
            elif inner.opcode == "fusion":
                found += _collectives_in(program, inner)
    return found


def _called_by_fusion_or_async(program: Program) -> set[str]:
    callers = ("fusion", "async-start", "async-update", "async-done")
    lines = [i for found in program.values() for i in found if i.opcode in callers]
    return {name for instruction in lines for name in instruction.calls}


def _reached_from_loops(program: Program) -> set[str]:
    todo = [c for lines in program.values() for i in lines if i.opcode == "while" for c in i.calls]
    reached: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += [c for i in program.get(name, []) for c in i.calls]
    return reached
