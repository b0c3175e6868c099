"""Gate, up and activation of experts: what stands before the last product of a gated layer."""

import jax
import jax.numpy as jnp

from moejax.core.errors import InputError
from moejax.ops.gated_ffn import Activation
from moejax.ops.group_sizes import GroupSizes, integers, plain
from moejax.ops.grouped_matmul import check, chosen, grouped_matmul


def grouped_gated(
    lhs: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    group_sizes: GroupSizes,
    activation: Activation,
    *,
    implementation: str | None = None,
    groups: jax.Array | None = None,
) -> jax.Array:
    """The hidden layer of gated experts, each on its own group of rows (Shazeer 2020, eq. 6).

    out[r] = act(lhs[r] @ w_gate[e]) * (lhs[r] @ w_up[e]) where row r lies in group e; rows past
    sum(group_sizes) give zeros and pass no gradient.

    lhs [R, D], w_gate and w_up [E, D, F], group_sizes [E] integers >= 0 -> [R, F], of the operands'
    dtype. activation: elementwise, such as jax.nn.silu. implementation, groups and what is raised:
    as in `grouped_matmul`, which the two products are; `tpu` is one kernel of both, whose products
    never leave the chip's VMEM where no gradient is taken.
    """
    if chosen(implementation) == "tpu":
        floats = _checked(lhs, w_gate, w_up, group_sizes, groups)
        from moejax.ops.grouped_matmul_tpu import grouped_gated_tpu  # Pallas is slow to import

        return grouped_gated_tpu(*floats, integers(group_sizes), activation, groups)
    _same_shape(w_gate, w_up)

    def product(weight: jax.Array) -> jax.Array:
        return grouped_matmul(
            lhs, weight, group_sizes, implementation=implementation, groups=groups
        )

    return activation(product(w_gate)) * product(w_up)


def gated_products(
    lhs: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    group_sizes: GroupSizes,
    activation: Activation,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`grouped_gated` and the two products it is made of, which a backward pass takes.

    `tpu` has no gradient of it.
    """
    if chosen(implementation) == "tpu":
        floats = _checked(lhs, w_gate, w_up, group_sizes, None)
        from moejax.ops.grouped_matmul_tpu import gated_products_tpu  # Pallas is slow to import

        return gated_products_tpu(*floats, integers(group_sizes), activation)
    _same_shape(w_gate, w_up)
    gate, up = (
        grouped_matmul(lhs, w, group_sizes, implementation=implementation) for w in (w_gate, w_up)
    )
    return activation(gate) * up, gate, up


def _same_shape(w_gate: jax.Array, w_up: jax.Array) -> None:
    if w_gate.shape != w_up.shape:
        raise InputError(
            f"grouped_gated: w_gate is {list(w_gate.shape)} and w_up {list(w_up.shape)}; "
            "they must be equal."
        )


def _checked(
    lhs, w_gate, w_up, group_sizes: GroupSizes, groups
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The operands of `tpu`, in one type."""
    _same_shape(w_gate, w_up)
    check(lhs, w_gate, plain(group_sizes), groups)
    dtype = jnp.result_type(lhs, w_gate, w_up)
    return lhs.astype(dtype), w_gate.astype(dtype), w_up.astype(dtype)
