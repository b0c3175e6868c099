"""Grouped matmul: rows sorted by group, each group times its own matrix. One name, many kernels."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from moejax.core.errors import InputError
from moejax.core.platform import platform, takes_gpu_kernels
from moejax.ops.group_sizes import GroupSizes, integers, plain
from moejax.ops.grouped_matmul_cpu import grouped_matmul_cpu
from moejax.ops.grouped_matmul_ref import grouped_matmul_ref
from moejax.ops.implementations import checked
from moejax.ops.kept import GROUPED
from moejax.ops.wide_product import wide_product

# (lhs, rhs, group_sizes, groups) -> out, with a gradient of its own.
Kernel = Callable[[jax.Array, jax.Array, Any, jax.Array | None], jax.Array]
_log = logging.getLogger(__name__)


def _ragged_dot(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, groups: jax.Array | None
) -> jax.Array:
    if groups is not None:  # jax's own gradient does the work of every group all the same
        rhs = jnp.where(groups[:, None, None], rhs, jax.lax.stop_gradient(rhs))
    return wide_product(jax.lax.ragged_dot, lhs, rhs, group_sizes).astype(lhs.dtype)


def _gpu(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, groups: jax.Array | None
) -> jax.Array:
    # Only where it is wanted: Pallas is slow to import, and jax 0.12 warns that its Triton goes.
    from moejax.ops.grouped_matmul_gpu import grouped_matmul_gpu

    return grouped_matmul_gpu(lhs, rhs, group_sizes, groups)


def _tpu(
    lhs: jax.Array, rhs: jax.Array, group_sizes: GroupSizes, groups: jax.Array | None
) -> jax.Array:
    from moejax.ops.grouped_matmul_tpu import grouped_matmul_tpu  # as above

    return grouped_matmul_tpu(lhs, rhs, group_sizes, groups)


_KERNELS: dict[str, Kernel] = {
    "ref": grouped_matmul_ref,
    "ragged_dot": _ragged_dot,
    "cpu": grouped_matmul_cpu,
    "gpu": _gpu,
    "tpu": _tpu,
}
IMPLEMENTATIONS = tuple(_KERNELS)
# Compiled for one platform only; the others are plain JAX and run anywhere.
PLATFORM = {"gpu": "gpu", "tpu": "tpu"}


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: GroupSizes,
    *,
    implementation: str | None = None,
    groups: jax.Array | None = None,
) -> jax.Array:
    """Multiplies consecutive groups of rows each by its own matrix, as `jax.lax.ragged_dot` does.

    out[r] = lhs[r] @ rhs[e] where row r lies in group e; rows past sum(group_sizes) give zeros
    and pass no gradient. Sums are at least float32, the result has the operands' dtype.

    lhs [R, K], rhs [E, K, N], group_sizes [E] integers >= 0 -> [R, N]. Differentiable in lhs and
    rhs. groups: bool [E] or None (all); where false the gradient of rhs[e] is zero and, but for
    `ref` and `ragged_dot`, no work is done for it; the output and the gradient of lhs stay whole.
    implementation: a name in IMPLEMENTATIONS, never replaced by another; None takes `cpu` on a
    CPU, `gpu` on an H100, H200 or B200, and `ragged_dot` on a TPU, where our own kernels have not
    run yet, and on other GPUs, which lack the shared memory for ours; it logs that once.
    Raises ValueError for shapes that do not fit and, where they are known (outside of jit), for
    sizes below zero or of more rows than there are; NotImplementedError for an implementation that
    the devices cannot run.
    """
    check(lhs, rhs, plain(group_sizes), groups)
    name, dtype = chosen(implementation), jnp.result_type(lhs, rhs)
    sizes = integers(group_sizes) if name == "tpu" else plain(group_sizes).astype(jnp.int32)
    out = _KERNELS[name](lhs.astype(dtype), rhs.astype(dtype), sizes, groups)
    return checkpoint_name(out, GROUPED)


def prepared(
    group_sizes: jax.Array,
    rows: jax.Array,
    d_ff: int,
    *,
    backward: bool,
    implementation: str | None = None,
) -> GroupSizes:
    """Group sizes for all products of gated experts over the same rows, to be given in their place.

    rows: as many as those have, [R, D], and of their type. d_ff: F of the experts. backward:
    whether those of a backward pass, else those of a forward one. `tpu` looks at them once then,
    and not for every product; nothing else prepares anything.
    """
    sizes = group_sizes.astype(jnp.int32)
    if chosen(implementation) != "tpu":
        return sizes
    from moejax.ops.grouped_matmul_tpu import prepared_tpu  # Pallas is slow to import

    return prepared_tpu(sizes, rows, d_ff, backward)


def chosen(implementation: str | None) -> str:
    """The implementation asked for, or the one None stands for; raises as `grouped_matmul`."""
    if implementation is None:
        return _choose(platform(), takes_gpu_kernels())
    return checked("grouped_matmul", implementation, IMPLEMENTATIONS, PLATFORM)


@functools.lru_cache
def _choose(backend: str, ours: bool) -> str:
    name = "cpu" if backend == "cpu" else "gpu" if ours else "ragged_dot"
    _log.info("grouped_matmul: %r on the %s backend", name, backend)
    return name


def check(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, groups: jax.Array | None) -> None:
    """Raises InputError, with both numbers, for operands that do not fit each other."""
    if lhs.ndim != 2 or rhs.ndim != 3 or group_sizes.ndim != 1:
        raise InputError(
            "grouped_matmul takes lhs [R, K], rhs [E, K, N] and group_sizes [E], not shapes "
            f"{lhs.shape}, {rhs.shape} and {group_sizes.shape}."
        )
    if lhs.shape[1] != rhs.shape[1]:
        raise InputError(
            f"grouped_matmul: lhs has K={lhs.shape[1]} columns and rhs K={rhs.shape[1]} rows; "
            "they must be equal."
        )
    if group_sizes.shape[0] != rhs.shape[0]:
        raise InputError(
            f"grouped_matmul: {group_sizes.shape[0]} group sizes for {rhs.shape[0]} matrices; "
            "give one size per matrix."
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise InputError(f"grouped_matmul: group_sizes are {group_sizes.dtype}; give integers.")
    _check_counts(lhs.shape[0], group_sizes)
    if groups is not None and (groups.shape != group_sizes.shape or groups.dtype != jnp.bool_):
        raise InputError(
            f"grouped_matmul: groups is {groups.dtype}{list(groups.shape)} for "
            f"{rhs.shape[0]} matrices; give bool[{rhs.shape[0]}]."
        )


def _check_counts(num_rows: int, group_sizes: jax.Array) -> None:
    """Sizes that are known, as they are outside of jit, must be sizes and have their rows."""
    if isinstance(group_sizes, jax.core.Tracer):
        return
    if not getattr(group_sizes, "is_fully_addressable", True):  # of other processes too
        return
    sizes = np.asarray(group_sizes)
    if sizes.size and sizes.min() < 0:
        raise InputError(f"grouped_matmul: group {sizes.argmin()} has {sizes.min()} rows.")
    if sizes.sum() > num_rows:
        raise InputError(
            f"grouped_matmul: the group sizes add up to {sizes.sum()} and lhs has {num_rows} rows; "
            "give a row for each, or smaller groups."
        )
