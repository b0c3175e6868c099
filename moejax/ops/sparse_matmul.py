"""Products with chosen blocks of a matrix's rows: what decoding with skipped neurons is made of."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.core.errors import InputError
from moejax.core.platform import platform, takes_gpu_kernels
from moejax.ops import sparse_matmul_native as native
from moejax.ops.implementations import checked
from moejax.ops.sparse_matmul_cpu import sparse_matmul_cpu
from moejax.ops.sparse_matmul_ref import sparse_matmul_ref

# (x, w_MPD, chosen_K) -> out.
Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# Bytes in one piece from which on copies from a TPU's memory come at its full speed.
MIN_TPU_COPY = 64 << 10
_log = logging.getLogger(__name__)


def _gpu(x: jax.Array, w_MPD: jax.Array, chosen_K: jax.Array) -> jax.Array:
    from moejax.ops.sparse_matmul_gpu import sparse_matmul_gpu  # Pallas is slow to import

    return sparse_matmul_gpu(x, w_MPD, chosen_K)


def _tpu(x: jax.Array, w_MPD: jax.Array, chosen_K: jax.Array) -> jax.Array:
    from moejax.ops.sparse_matmul_tpu import sparse_matmul_tpu  # as above

    return sparse_matmul_tpu(x, w_MPD, chosen_K)


_KERNELS: dict[str, Kernel] = {
    "ref": sparse_matmul_ref,
    "cpu": sparse_matmul_cpu,
    "native": native.sparse_matmul_native,
    "gpu": _gpu,
    "tpu": _tpu,
}
IMPLEMENTATIONS = tuple(_KERNELS)
# Compiled for one platform only; the others are plain JAX and run anywhere.
PLATFORM = {"native": "cpu", "gpu": "gpu", "tpu": "tpu"}


def sparse_matmul(
    x: jax.Array, w_MPD: jax.Array, chosen_K: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Multiplies by some of the M blocks of P rows that a matrix is cut into, and reads no other.

        x [B, D]:     out[b, k, p] = sum_d  x[b, d]    w[chosen[k], p, d]     [B, K, P]
        x [B, K, P]:  out[b, d]    = sum_kp x[b, k, p] w[chosen[k], p, d]     [B, D]

    A row is a neuron (of gate, up or down) or one of a head's C queries or outputs, so a block lies
    in one piece and both directions read it in order (the neuron-major layout of Liu et al. 2023,
    "Deja Vu", section 4.3). w [M, P, D]; chosen: integers in [0, M), any order, repeats allowed.
    Sums are at least float32, the result has x's dtype; no gradient. implementation: a name of
    IMPLEMENTATIONS, never replaced by another. None takes `native` on a CPU (a C++ kernel, compiled
    on first use) where it can be had and the arrays are float32, else `cpu` (plain XLA, a block at
    a time), as on GPUs without the shared memory for ours; on a TPU, H100, H200 or B200 the kernel
    for it, though the TPU's has only been compiled and has not run: `ref` would copy the blocks and
    save nothing.

    Errors:
      InputError: shapes that do not fit, an unknown implementation, `native` without a compiler.
      NotImplementedError: an implementation that these devices or types cannot run.
    """
    check(x, w_MPD, chosen_K)
    kernel = _KERNELS[chosen(implementation, w_MPD.dtype)]
    return kernel(x.astype(w_MPD.dtype), w_MPD, chosen_K.astype(jnp.int32)).astype(x.dtype)


def chosen(implementation: str | None, dtype: jnp.dtype) -> str:
    """The implementation asked for, or the one None stands for; raises as `sparse_matmul`."""
    if implementation is None:
        return _choose(platform(), jnp.dtype(dtype) == jnp.float32, takes_gpu_kernels())
    return checked("sparse_matmul", implementation, IMPLEMENTATIONS, PLATFORM)


@functools.lru_cache
def _choose(backend: str, is_float32: bool, ours: bool) -> str:
    name, why = backend, ""
    if backend == "gpu" and not ours:
        name, why = "cpu", "plain XLA: no H100, H200 or B200"
    if backend == "cpu":
        why = native.missing() or ""
        name = "native" if is_float32 and not why else "cpu"
    _log.info("sparse_matmul: %r on the %s backend%s", name, backend, why and f" ({why})")
    return name


def check(x: jax.Array, w_MPD: jax.Array, chosen_K: jax.Array) -> None:
    """Raises InputError, with both numbers, for operands that do not fit each other."""
    if x.ndim not in (2, 3) or w_MPD.ndim != 3 or chosen_K.ndim != 1:
        raise InputError(
            "sparse_matmul takes x [B, D] or [B, K, P], w [M, P, D] and chosen [K], not shapes "
            f"{x.shape}, {w_MPD.shape} and {chosen_K.shape}."
        )
    if x.ndim == 2 and x.shape[1] != w_MPD.shape[2]:
        raise InputError(
            f"sparse_matmul: x has D={x.shape[1]} columns and w D={w_MPD.shape[2]}; "
            "they must be equal."
        )
    if x.ndim == 3 and x.shape[1:] != (chosen_K.shape[0], w_MPD.shape[1]):
        raise InputError(
            f"sparse_matmul: x is {list(x.shape)} for {chosen_K.shape[0]} chosen blocks of "
            f"{w_MPD.shape[1]} rows; it must be [B, K, P]."
        )
    if not jnp.issubdtype(chosen_K.dtype, jnp.integer):
        raise InputError(f"sparse_matmul: chosen is {chosen_K.dtype}; give integers.")
