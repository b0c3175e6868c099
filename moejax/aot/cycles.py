"""Cycles of a Pallas TPU kernel as the compiler counts them in its own schedule.

libtpu writes that estimate into the compiled program where its dump of static profiles is on, which
has to be asked for before libtpu is loaded: a process that adds `environment` to that of
`moejax.aot.topology` and compiles one program. The estimate counts bundles, the matrix units' waits
and the first fetches, but no wait for HBM after them, and no branch: a kernel to be counted has
none around its work, and a grid of known size. The same program gives the same number every time.
"""

import re
from typing import NamedTuple

import jax

_ESTIMATE = re.compile(r'"?estimated_cycles"?:"?(\d+)')
_BOUNDS = re.compile(r'"(kernel_window|iteration)_bounds":\[([^\]]*)\]')
_SKIPS = re.compile(r'"mask_dim_to_iteration_index":\[[^\]]*"(\d+)"\]')
_SUBLANES = 8  # rows of a tile, in which the bounds of windows are given
_KERNEL = re.compile(r'custom_call_target="tpu_custom_call"')


def environment(folder: str) -> dict[str, str]:
    """What libtpu needs in its environment to count cycles; its dumps go to the folder."""
    flags = (f"dump_to={folder}", "dump_llo_text=true", f"dump_static_llo_profile_to={folder}")
    return {"LIBTPU_INIT_ARGS": " ".join(f"--xla_jf_{flag}" for flag in flags)}


class Masked(NamedTuple):
    """A product that XLA computes for every group under a mask, window of rows by window.

    cycles: XLA's own for all groups and windows; those without a row of the group are skipped when
    it runs. rows: of a window, of which there are `windows`.
    """

    cycles: int
    rows: int
    windows: int


def masked_product(compiled: jax.stages.Compiled) -> Masked:
    """The one masked product of a program; ValueError when it has none or several."""
    lines = [line for line in (compiled.as_text() or "").splitlines() if _SKIPS.search(line)]
    if len(lines) != 1:
        raise ValueError(f"the compiled program has {len(lines)} masked products, not one.")
    found = {name: _numbers(bounds) for name, bounds in _BOUNDS.findall(lines[0])}
    skips, estimate = _SKIPS.search(lines[0]), _ESTIMATE.search(lines[0])
    assert skips and estimate
    rows = found["kernel_window"][1] * _SUBLANES
    return Masked(int(estimate[1]), rows, found["iteration"][int(skips[1])])


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def kernel_cycles(compiled: jax.stages.Compiled) -> int:
    """Estimated cycles of one core in all Pallas kernels of the program.

    Raises ValueError when the program has none or they were not counted.
    """
    kernels = [line for line in (compiled.as_text() or "").splitlines() if _KERNEL.search(line)]
    return _sum(kernels, "a Pallas kernel")


def program_cycles(compiled: jax.stages.Compiled, without: tuple[str, ...] = ()) -> int:
    """Estimated cycles of every instruction that has an estimate, each counted once.

    XLA's cost model where it has one, else the schedule's bundles. Of a kernel with a grid of
    unknown size it is no estimate: libtpu takes some number of steps, whatever the arrays' sizes.
    without: texts (" copy(") whose instructions are left out. Raises as `kernel_cycles`.
    """
    lines = (compiled.as_text() or "").splitlines()
    kept = [line for line in lines if not any(text in line for text in without)]
    return _sum(kept, "an instruction")


def _sum(lines: list[str], what: str) -> int:
    found = [int(match[1]) for line in lines if (match := _ESTIMATE.search(line))]
    if not found or not lines:
        raise ValueError(
            f"the compiled program has no cycles of {what}: compile it in a process that was "
            "started with moejax.aot.cycles.environment."
        )
    return sum(found)
