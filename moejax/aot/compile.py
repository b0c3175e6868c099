"""Compiling for devices that are not here, and what the compiled program takes of one of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.core.platform import compiling_for


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while the program runs, as XLA's buffer assignment has them.

    alias_bytes are outputs that live in donated arguments, counted in both.
    """

    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.argument_bytes + self.output_bytes + self.temp_bytes - self.alias_bytes


def abstract(
    shape: tuple[int, ...], dtype: Any, mesh: Mesh, spec: PartitionSpec
) -> jax.ShapeDtypeStruct:
    """An argument that is only shape, dtype and sharding: what a program is compiled for."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def compile_for(
    function: Callable[..., Any],
    *arguments: Any,
    donate: tuple[int, ...] = (),
    options: dict[str, str | bool] | None = None,
) -> jax.stages.Compiled:
    """Compiles for the devices of the arguments' shardings (trees of `abstract`). Nothing runs.

    options: the compiler's own, as {"xla_tpu_enable_async_all_to_all": "true"}.

    What chooses by the platform (`moejax.core.platform`) chooses for those devices.
    """
    device = min(jax.tree.leaves(arguments)[0].sharding.device_set, key=lambda d: d.id)
    with compiling_for(device.platform, device.device_kind):
        lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
        return lowered.compile(compiler_options=options)


def memory(compiled: jax.stages.Compiled) -> Memory:
    """Bytes per device; the temporary ones are the honest figure for buffers and dispatch."""
    stats = compiled.memory_analysis()
    if stats is None:
        raise NotImplementedError("this backend reports no memory of compiled programs")
    return Memory(
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        temp_bytes=stats.temp_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
    )


def flops(compiled: jax.stages.Compiled) -> float | None:
    """Operations of one device's program, None where the compiler counts none (CUDA).

    Static: buffer rows count whether routed to or not, the body of a loop counts once, and a
    Pallas kernel counts what its own cost estimate says. Not a measure to rank kernels by.
    """
    cost = compiled.cost_analysis()
    return None if not cost or "flops" not in cost else float(cost["flops"])
