"""The sizes of the mesh's axes, where the user leaves some of them open."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, Mesh

from moejax.core import tree
from moejax.core.chips import chip_of_kind
from moejax.core.errors import InputError
from moejax.core.mesh import AXES, make_mesh
from moejax.core.sharding import param_spec
from moejax.models.config import ModelConfig
from moejax.models.flops import num_params
from moejax.models.params import abstract_params
from moejax.train.placement import check_rows

AUTOMATIC = 0
_STATE_BYTES = 16  # of one parameter: float32 with AdamW's moments and a gradient


def choose_mesh(
    wanted: Mapping[str, int],
    model: ModelConfig,
    num_rows: int,
    accumulation: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh with the axis sizes of `wanted`, of which `AUTOMATIC` (0) ones are chosen.

    Of all sizes that multiply to the number of devices, that every parameter and the batch divide
    by, the first by this order: fewest devices on "tensor" (it sums activations in every layer);
    of an MoE the most on "expert" (tokens travel, not weights); then the most on "fsdp" (state is
    split, not copied), but on TPUs, if memory allows, no more than leaves a device 128 of a width:
    XLA gathers narrower parts by all-reduces of the whole, twice the bytes; "data" takes what is
    left.

    Errors: InputError where no sizes fit, with what forbids the first choice.
    """
    found = list(jax.devices() if devices is None else devices)
    unknown = sorted(set(wanted) - set(AXES))
    if unknown or min(wanted.values(), default=0) < 0:
        raise InputError(f"mesh {dict(wanted)}: sizes are 1 or more (0 chooses) for {AXES}")
    tried: list[tuple[tuple[int, ...], str]] = []
    chip, number = chip_of_kind(getattr(found[0], "device_kind", "")), num_params(model)

    def order(each: tuple[int, ...]) -> tuple[int, ...]:
        _, fsdp, expert, tensor = each
        state = _STATE_BYTES * number // (fsdp * expert * tensor)
        tiled = (
            chip is not None
            and model.d_model // (fsdp * expert) >= chip.lanes
            and state <= chip.hbm_bytes // 2
        )
        return tensor, -expert, -tiled, -fsdp

    sizes = sorted(_sizes(len(found), wanted, model), key=order)
    if not sizes:
        given = {axis: size for axis, size in wanted.items() if size}
        raise InputError(
            f"mesh {given} and {len(found)} devices: the sizes must multiply to that number, with "
            "the axes at 0 chosen so that they do"
        )
    for each in sizes:
        problem = _problem(each, model, num_rows, accumulation)
        if not problem:
            return make_mesh(*each, devices=found)
        tried.append((each, problem))
    first, problem = tried[0]
    raise InputError(
        f"none of {len(tried)} mesh shapes for {len(found)} devices fits; "
        f"{dict(zip(AXES, first, strict=True))}: {problem}"
    )


def describe_mesh(mesh: Mesh) -> str:
    """As "data 1 x fsdp 2 x expert 4 x tensor 1 = 8 devices"."""
    sizes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES)
    return f"{sizes} = {mesh.size} device{'s' if mesh.size > 1 else ''}"


def _sizes(num: int, wanted: Mapping[str, int], model: ModelConfig) -> Iterator[tuple[int, ...]]:
    divisors = [n for n in range(1, num + 1) if num % n == 0]
    choices = [[wanted[axis]] if wanted.get(axis) else divisors for axis in AXES]
    if model.moe is None and not wanted.get("expert"):
        choices[AXES.index("expert")] = [1]
    for data in choices[0]:
        for fsdp in choices[1]:
            for expert in choices[2]:
                for tensor in choices[3]:
                    if data * fsdp * expert * tensor == num:
                        yield data, fsdp, expert, tensor


def _problem(sizes, model: ModelConfig, num_rows: int, accumulation: int) -> str:
    """Why these sizes do not fit, empty if they do."""
    mesh = AbstractMesh(sizes, AXES)
    try:
        for path, leaf in tree.flatten(abstract_params(model)).items():
            param_spec(path, leaf.shape, mesh)
        check_rows(num_rows, accumulation, mesh)
    except InputError as error:
        return str(error)
    assert math.prod(sizes) == mesh.size
    return ""
