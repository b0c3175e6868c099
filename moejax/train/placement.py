"""Where all of a training step lies on a mesh, and the step as a program not yet compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.mesh import TOKEN_AXES
from moejax.core.platform import compiling_for
from moejax.core.sharding import param_spec, slot_spec
from moejax.train.state import TrainState, init_state, named, renamed
from moejax.train.step import Adjust, LossFn, StepOptions, make_train_step

ROWS = PartitionSpec(TOKEN_AXES)


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A jitted training step and the abstract arguments that it takes, shardings included.

    Lowered for whatever devices the mesh has, which need not be here: with a mesh of
    `moejax.aot.topology`, ``program.lower().compile()`` compiles the real step for a pod
    (`moejax.aot.compile.memory` and `flops` read the result). Donated: the state.

    Attributes:
      step: jitted (state, frozen, batch, key) -> (state, metrics).
      state, frozen, batch, key: trees of `jax.ShapeDtypeStruct` with shardings.
      mesh, optimizer: what they were made with.
    """

    step: jax.stages.Wrapped
    state: TrainState
    frozen: tree.Tree
    batch: dict[str, jax.ShapeDtypeStruct]
    key: jax.ShapeDtypeStruct
    mesh: Mesh
    optimizer: optax.GradientTransformation

    def lower(self) -> jax.stages.Lowered:
        """Traces and lowers for the mesh's devices. Nothing runs, no array is made."""
        device = self.mesh.devices.flat[0]
        with compiling_for(device.platform, device.device_kind):
            return self.step.lower(self.state, self.frozen, self.batch, self.key)


def step_program(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    params: tuple[tree.Tree, tree.Tree],
    batch: Mapping[str, jax.ShapeDtypeStruct],
    options: StepOptions,
    adjust: Adjust | None = None,
) -> StepProgram:
    """The training step on `options.mesh`, from shapes alone.

    Args:
      loss_fn: of (trainable, frozen, batch, rng).
      params: trainable and frozen parameters, arrays or abstract.
      batch: abstract arrays of the global batch [B, ...].

    Errors: InputError where a parameter, or the rows of a microbatch, do not divide by the mesh.
    """
    mesh = options.mesh
    assert mesh is not None
    trainable, frozen = (tree.abstract(part) for part in params)
    check_rows(next(iter(batch.values())).shape[0], options.accumulation, mesh)
    state = place_state(jax.eval_shape(lambda p: init_state(p, optimizer), trainable), mesh)
    options = dataclasses.replace(options, shardings=jax.tree.map(lambda s: s.sharding, state))
    rows, everywhere = NamedSharding(mesh, ROWS), NamedSharding(mesh, PartitionSpec())
    key = jax.eval_shape(lambda: jax.random.key(0))
    return StepProgram(
        make_train_step(loss_fn, optimizer, options, adjust),
        state,
        place_params(frozen, mesh),
        {name: _struct(leaf, rows) for name, leaf in batch.items()},
        _struct(key, everywhere),
        mesh,
        optimizer,
    )


def place_params(params: tree.Tree, mesh: Mesh | AbstractMesh) -> tree.Tree:
    """Abstract parameters with the shardings of `moejax.core.sharding`."""

    def placed(path, leaf):
        return _struct(leaf, NamedSharding(mesh, param_spec(path, leaf.shape, mesh)))

    return tree.map_with_path(placed, params)


def place_state(state: TrainState, mesh: Mesh | AbstractMesh) -> TrainState:
    """An abstract state with shardings: every optimizer slot lies as its parameter does."""
    params = place_params(state.params, mesh)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(state.params).items()}

    def placed(path, leaf):
        return _struct(leaf, NamedSharding(mesh, slot_spec(path, leaf.shape, shapes, mesh)))

    slots = renamed(tree.map_with_path(placed, named(state.opt_state)), state.opt_state)
    step: Any = _struct(state.step, NamedSharding(mesh, PartitionSpec()))
    return TrainState(step, params, slots)


def check_rows(num_rows: int, accumulation: int, mesh: Mesh | AbstractMesh) -> None:
    """InputError unless every microbatch's rows divide by the devices that share out tokens."""
    parts = int(np.prod([mesh.shape[axis] for axis in TOKEN_AXES]))
    if num_rows % accumulation or (num_rows // accumulation) % parts:
        raise InputError(
            f"a batch of {num_rows} rows in {accumulation} microbatch(es) does not divide by the "
            f"{parts} devices of mesh axes {'+'.join(TOKEN_AXES)}: train.batch_size must be a "
            f"multiple of {accumulation * parts}, or put devices on the tensor axis"
        )


def global_batch(
    mesh: Mesh, rows: Callable[[int, int], Mapping[str, np.ndarray]], num_rows: int
) -> dict[str, jax.Array]:
    """The batch of `num_rows` rows on the mesh, of which this process reads only its own.

    rows(first, last) gives rows first..last-1 of the global batch; each process asks for those
    that its devices hold, so the batch is the same for any number of processes.
    """
    sharding = NamedSharding(mesh, ROWS)
    local = sharding.addressable_devices_indices_map((num_rows,))
    spans = {index[0].indices(num_rows)[:2] for index in local.values() if index is not None}
    first, last = min(s[0] for s in spans), max(s[1] for s in spans)
    whole = rows(first, last)

    def made(array: np.ndarray) -> jax.Array:
        def part(index):
            start, stop, _ = index[0].indices(num_rows)
            return array[start - first : stop - first]

        return jax.make_array_from_callback((num_rows, *array.shape[1:]), sharding, part)

    return {name: made(array) for name, array in whole.items()}


def _struct(leaf, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
