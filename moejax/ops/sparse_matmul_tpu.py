"""Products with chosen blocks for TPUs: Pallas kernels whose block list is prefetched as scalars.

The grid walks over the chosen blocks; the index maps read the list, so the next blocks travel from
HBM while these are multiplied, each in one copy (256 KB for a head of 64 x 2,048 in bfloat16,
512 KB for 128 neurons of 2,048). A step takes several blocks where one is short. Checked in the TPU
interpreter with its race detector and compiled ahead of time for v5e and v5p; they have not run on
a TPU yet.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.ops.gated_ffn import Activation
from moejax.ops.sparse_matmul import MIN_TPU_COPY

Interpret = bool | pltpu.InterpretParams
STEP_BYTES = 512 << 10  # of one matrix in a step, at least, where there are as many blocks
_log = logging.getLogger(__name__)
_NT = (((1,), (1,)), ((), ()))  # both by their columns


def sparse_matmul_tpu(
    x: jax.Array, w_MPD: jax.Array, chosen_K: jax.Array, interpret: Interpret = False
) -> jax.Array:
    """See `moejax.ops.sparse_matmul.sparse_matmul`; InterpretParams run it on any device.

    Raises NotImplementedError for types other than float32 and bfloat16.
    """
    _check(w_MPD)
    if x.ndim == 2:
        return _into(x, w_MPD, chosen_K, interpret)
    return _out_of(x, w_MPD, chosen_K, interpret)


def _into(x_BD, w_MPD, chosen_K, interpret) -> jax.Array:
    """out [B, K, P] of x [B, D]."""
    num_rows = w_MPD.shape[1]
    num_chosen, step = _steps(chosen_K, w_MPD)

    def kernel(_, x, *refs):
        *blocks, out = refs
        for i, block in enumerate(blocks):
            out[i] = _dot(x[...], block[0], _NT).astype(out.dtype)

    shape = (num_chosen, x_BD.shape[0], num_rows)
    out_KBP = _call(
        kernel,
        (num_chosen // step, shape, x_BD.dtype),
        [_whole(x_BD), *_blocks(w_MPD, step)],
        pl.BlockSpec((step, *shape[1:]), lambda i, chosen: (i, 0, 0)),
        (chosen_K, x_BD, *[w_MPD] * step),
        interpret,
        "sparse_matmul_into",
    )
    return jnp.swapaxes(out_KBP, 0, 1)


def _out_of(x_BKP, w_MPD, chosen_K, interpret) -> jax.Array:
    """out [B, D] of x [B, K, P]."""
    num_chosen, step = _steps(chosen_K, w_MPD)
    x_KBP = jnp.swapaxes(x_BKP, 0, 1)

    def kernel(_, x, *refs):
        *blocks, out = refs
        parts = [_dot(x[i], block[0]) for i, block in enumerate(blocks)]
        _add(out, sum(parts[1:], parts[0]))

    shape = (x_KBP.shape[1], w_MPD.shape[2])
    out = _call(
        kernel,
        (num_chosen // step, shape, jnp.float32),
        [
            pl.BlockSpec((step, *x_KBP.shape[1:]), lambda i, chosen: (i, 0, 0)),
            *_blocks(w_MPD, step),
        ],
        pl.BlockSpec(shape, lambda i, chosen: (0, 0)),
        (chosen_K, x_KBP, *[w_MPD] * step),
        interpret,
        "sparse_matmul_out_of",
    )
    return out.astype(x_BKP.dtype)


def sparse_ffn_tpu(
    params: dict[str, Any],
    x_BD: jax.Array,
    chosen_K: jax.Array,
    activation: Activation,
    weight_BK: jax.Array | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """See `moejax.ops.sparse_ffn.sparse_ffn`, without b_down: all products in one kernel.

    The hidden neurons of a block never leave VMEM.
    """
    names: list[str] = [name for name in ("rows_gate", "rows_up", "rows_down") if name in params]
    _check(params["rows_down"])
    num_rows, num_chosen = params["rows_up"].shape[1], chosen_K.shape[0]
    extras: dict[str, jax.Array] = {
        n: params[n].astype(jnp.float32)[:, None] for n in ("b_gate", "b_up") if n in params
    }
    if weight_BK is not None:  # along lanes, as the hidden neurons lie
        wide = jnp.swapaxes(weight_BK, 0, 1)[:, :, None].astype(jnp.float32)
        extras["weight"] = jnp.broadcast_to(wide, (*wide.shape[:2], num_rows))

    def kernel(_, x, *refs):
        rows = dict(zip(names, refs, strict=False))
        extra = dict(zip(extras, refs[len(names) : -1], strict=True))

        def into(name):
            y = _dot(x[...], rows[f"rows_{name}"][0], _NT)
            return y + extra[f"b_{name}"][0] if f"b_{name}" in extra else y

        h = activation(into("gate")) * into("up") if "rows_gate" in rows else activation(into("up"))
        if "weight" in extra:
            h = h * extra["weight"][0]
        down = rows["rows_down"][0]
        _add(refs[-1], _dot(h.astype(down.dtype), down))

    shape = x_BD.shape
    out = _call(
        kernel,
        (num_chosen, shape, jnp.float32),
        [
            _whole(x_BD),
            *(_blocks(params[name], 1)[0] for name in names),
            *(_in_turn(e) if name == "weight" else _blocks(e, 1)[0] for name, e in extras.items()),
        ],
        pl.BlockSpec(shape, lambda i, chosen: (0, 0)),
        (chosen_K, x_BD, *(params[name] for name in names), *extras.values()),
        interpret,
        "sparse_ffn",
    )
    return out.astype(x_BD.dtype)


def _call(kernel, grid_shape_dtype, in_specs, out_spec, operands, interpret, name):
    num_steps, shape, dtype = grid_shape_dtype
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(num_steps,), in_specs=in_specs, out_specs=out_spec
        ),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name=name,
    )(*operands)


def _blocks(w_MPD: jax.Array, step: int) -> list[pl.BlockSpec]:
    """One whole block each, the step's first, second and so on."""

    def at(which: int, i, chosen):
        return chosen[i * step + which], 0, 0

    shape = (1, *w_MPD.shape[1:])
    return [pl.BlockSpec(shape, functools.partial(at, which)) for which in range(step)]


def _in_turn(x_KBP: jax.Array) -> pl.BlockSpec:
    """The step's own part of what has one for each chosen block."""
    return pl.BlockSpec((1, *x_KBP.shape[1:]), lambda i, chosen: (i, 0, 0))


def _whole(x: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda i, chosen: (0,) * x.ndim)


def _steps(chosen_K: jax.Array, w_MPD: jax.Array) -> tuple[int, int]:
    """How many blocks are chosen, and how many of them a step takes: a divisor."""
    num_chosen = chosen_K.shape[0]
    size = w_MPD.shape[1] * w_MPD.shape[2] * w_MPD.dtype.itemsize
    wanted = max(1, min(8, STEP_BYTES // size))
    return num_chosen, max(step for step in range(1, wanted + 1) if num_chosen % step == 0)


def _dot(x, w, dims=(((1,), (0,)), ((), ()))):
    precision = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)


def _add(out, part) -> None:
    """The sum over the grid's steps, without a branch: the compiler counts cycles of no other."""
    out[...] = part + jnp.where(pl.program_id(0) == 0, 0.0, out[...])


def _check(w_MPD: jax.Array) -> None:
    if w_MPD.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"sparse_matmul 'tpu' takes float32 and bfloat16, not {w_MPD.dtype}: use 'ref'"
        )
    _warn_of_small(w_MPD.shape[1] * w_MPD.shape[2] * w_MPD.dtype.itemsize)


@functools.lru_cache
def _warn_of_small(num_bytes: int) -> None:
    """Once for each size: blocks that a TPU reads slower than it could."""
    if num_bytes < MIN_TPU_COPY:
        _log.warning(
            "blocks of %.1f KiB are copied one by one; a TPU wants %d KiB (config.mask.block)",
            num_bytes / 1024,
            MIN_TPU_COPY >> 10,
        )
