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
    if w_gate.shape != w_up.shape:
        raise InputError(
            f"grouped_gated: w_gate is {list(w_gate.shape)} and w_up {list(w_up.shape)}; "
            "they must be equal."
        )
    if chosen(implementation) == "tpu":
        check(lhs, w_gate, plain(group_sizes), groups)
        from moejax.ops.grouped_matmul_tpu import grouped_gated_tpu  # Pallas is slow to import

        dtype = jnp.result_type(lhs, w_gate, w_up)
        floats = (a.astype(dtype) for a in (lhs, w_gate, w_up))
        return grouped_gated_tpu(*floats, integers(group_sizes), activation, groups)

    def product(weight: jax.Array) -> jax.Array:
        return grouped_matmul(
            lhs, weight, group_sizes, implementation=implementation, groups=groups
        )

    return activation(product(w_gate)) * product(w_up)
