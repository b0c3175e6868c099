"""Grouped matmul, and the gated hidden layer, for TPUs: Pallas kernels that Mosaic compiles.

The rows' products are `tpu_rows`, the gradient of the matrices `tpu_outer`. Both begin their visits
where a group begins and balance the rows over the two cores of a v4 or v5p. Empty groups cost
nothing forward; K and N may be anything. Compiled ahead of time for v5e, v5p and v6e and checked in
the TPU interpreter with its race detector; they have not run on a TPU yet.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moejax.ops.gated_ffn import Activation
from moejax.ops.group_sizes import GroupSizes, plain
from moejax.ops.kept import GROUPED, keep
from moejax.ops.tpu_outer import outer
from moejax.ops.tpu_rows import Form, Interpret, multiply
from moejax.ops.tpu_tables import prepared
from moejax.ops.tpu_tiles import Operands, checked, outer_tiles, rows_tiles
from moejax.ops.tpu_visits import Wanted, fitted

Groups = jax.Array | None
PRODUCT = Form("grouped_matmul", ((0, 0),), lambda y: (y,), 1)
PRODUCT_T = Form("grouped_matmul_dx", ((0, 0),), lambda y: (y,), 1, transposed=True)
SUM_T = Form("grouped_gated_dx", ((0, 0), (1, 1)), lambda a, b: (a + b,), 1, transposed=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped_matmul_tpu(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: GroupSizes,
    groups: Groups = None,
    interpret: Interpret = False,
) -> jax.Array:
    """See `moejax.ops.grouped_matmul.grouped_matmul`; InterpretParams run it on any device.

    Raises NotImplementedError for types other than float32 and bfloat16, and for rows so long that
    the least tile does not fit VMEM.
    """
    return _rows(PRODUCT, [lhs], [rhs], group_sizes, interpret)[0]


def _forward(lhs, rhs, group_sizes, groups, interpret) -> tuple[jax.Array, Any]:
    out = grouped_matmul_tpu(lhs, rhs, group_sizes, groups, interpret)
    return out, (lhs, rhs, group_sizes, groups)


def _backward(interpret, saved, d_out: jax.Array):
    lhs, rhs, group_sizes, groups = saved
    d_lhs = _rows(PRODUCT_T, [d_out], [rhs], group_sizes, interpret)[0]
    return d_lhs, _outer(lhs, d_out, group_sizes, groups, interpret), None, None


grouped_matmul_tpu.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 6))
def grouped_gated_tpu(
    lhs: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    group_sizes: GroupSizes,
    activation: Activation,
    groups: Groups = None,
    interpret: Interpret = False,
) -> jax.Array:
    """See `moejax.ops.grouped_gated.grouped_gated`: both products and the activation in one kernel.

    The products stay in VMEM, in float32, and only the result is rounded. Where a gradient is
    taken they are written too, beside the result. Raises as `grouped_matmul_tpu`.
    """
    return _rows(_gated_form(activation, False), [lhs], [w_gate, w_up], group_sizes, interpret)[0]


@functools.lru_cache
def _gated_form(activation: Activation, with_products: bool) -> Form:
    """One for all calls: what is traced is kept by it."""

    def combine(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, ...]:
        hidden = activation(gate) * up
        return (hidden, gate, up) if with_products else (hidden,)

    return Form("grouped_gated", ((0, 0), (0, 1)), combine, 3 if with_products else 1)


def gated_products_tpu(
    lhs: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    group_sizes: GroupSizes,
    activation: Activation,
    interpret: Interpret = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `moejax.ops.grouped_gated.gated_products`: one kernel writes all three."""
    form = _gated_form(activation, True)
    hidden, gate, up = _rows(form, [lhs], [w_gate, w_up], group_sizes, interpret)
    return hidden, gate, up


def _gated_forward(lhs, w_gate, w_up, group_sizes, activation, groups, interpret):
    found = gated_products_tpu(lhs, w_gate, w_up, group_sizes, activation, interpret)
    out, gate, up = keep(found, GROUPED)
    return out, (lhs, w_gate, w_up, group_sizes, groups, gate, up)


def _gated_backward(activation, interpret, saved, d_out: jax.Array):
    lhs, w_gate, w_up, group_sizes, groups, gate, up = saved
    gate, up, d_hidden = (a.astype(jnp.float32) for a in (gate, up, d_out))
    activated, pull = jax.vjp(activation, gate)
    d_up = (d_hidden * activated).astype(lhs.dtype)
    d_gate = pull(d_hidden * up)[0].astype(lhs.dtype)
    d_lhs = _rows(SUM_T, [d_gate, d_up], [w_gate, w_up], group_sizes, interpret)[0]
    d_w = (_outer(lhs, d, group_sizes, groups, interpret) for d in (d_gate, d_up))
    return d_lhs, *d_w, None, None


grouped_gated_tpu.defvjp(_gated_forward, _gated_backward)


def grouped_outer_tpu(
    lhs: jax.Array,
    d_out: jax.Array,
    group_sizes: GroupSizes,
    before: jax.Array | None,
    begins: jax.Array | bool | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """See `moejax.ops.grouped_outer.grouped_outer`: before + sums are one kernel, in place."""
    shape = (plain(group_sizes).size, lhs.shape[1], d_out.shape[1])
    if 0 in (lhs.shape[0], *shape):
        nothing = jnp.zeros(shape, jnp.float32)
        if before is None:
            return nothing
        return before if begins is None else jnp.where(begins, nothing, before)
    tiles = outer_tiles(*shape[1:], lhs.dtype, added=True)
    return outer(lhs, d_out, group_sizes, None, tiles, interpret, jnp.float32, before, begins)


def prepared_tpu(
    group_sizes: jax.Array,
    rows: jax.Array,
    f: int,
    backward: bool,
    interpret: Interpret = False,
) -> GroupSizes:
    """See `moejax.ops.grouped_matmul.prepared`."""
    (num_rows, d), dtype, num_groups = rows.shape, rows.dtype, group_sizes.size
    if 0 in (num_rows, d, f, num_groups):
        return group_sizes
    gated = Operands(ws=2, products=2)
    products = ((d, f, Operands() if backward else gated), (f, d, Operands()))
    each = -(-num_rows // num_groups)
    of_rows = [rows_tiles(each, k, n, dtype, how).heights for k, n, how in products]
    sums = [outer_tiles(k, n, dtype, added=True).heights for k, n in ((d, f), (f, d)) if backward]
    wanted = [Wanted(False, *fitted(num_rows, heights)) for heights in of_rows]
    wanted += [Wanted(True, *fitted(num_rows, heights)) for heights in sums]
    return prepared(group_sizes, list(dict.fromkeys(wanted)), interpret)


def _rows(form: Form, xs, ws, group_sizes, interpret) -> list[jax.Array]:
    (num_rows, depth), num_groups = xs[0].shape, ws[0].shape[0]
    columns = ws[0].shape[1 if form.transposed else 2]
    if 0 in (num_rows, depth, columns, num_groups):
        checked(xs[0].dtype)
        return [jnp.zeros((num_rows, columns), xs[0].dtype)] * form.num_outs
    count = Operands(len(xs), len(ws), len(form.pairs), form.num_outs)
    tiles = rows_tiles(-(-num_rows // num_groups), depth, columns, xs[0].dtype, count)
    return multiply(form, xs, ws, group_sizes, tiles, interpret)


def _outer(lhs, d_out, group_sizes, groups: Groups, interpret) -> jax.Array:
    (num_rows, k), n, num_groups = lhs.shape, d_out.shape[1], plain(group_sizes).size
    if 0 in (num_rows, k, n, num_groups):
        return jnp.zeros((num_groups, k, n), lhs.dtype)
    return outer(lhs, d_out, group_sizes, groups, outer_tiles(k, n, lhs.dtype), interpret)
