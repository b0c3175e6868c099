"""One suite for every implementation of the gated hidden layer: forward and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.grouped_gated import grouped_gated
from tests.ops.test_grouped_matmul import ANYWHERE, CASES, NUM_ROWS, assert_close, operands


def by_definition(lhs, w_gate, w_up, sizes, activation):
    """Row by row, each with its own two matrices."""
    ends = np.cumsum(sizes)
    out = []
    for row in range(lhs.shape[0]):
        if row >= ends[-1]:
            out.append(jnp.zeros(w_up.shape[2], lhs.dtype))
            continue
        e = int(np.searchsorted(ends, row, side="right"))
        out.append(activation(lhs[row] @ w_gate[e]) * (lhs[row] @ w_up[e]))
    return jnp.stack(out)


def gated_operands(sizes, num_rows=NUM_ROWS, dtype="float32", k=24, n=40):
    lhs, w_gate, group_sizes = operands(sizes, num_rows, dtype, k, n)
    return lhs, w_gate, operands(sizes, num_rows, dtype, k, n, seed=5)[1], group_sizes


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize("activation", [jax.nn.silu, jax.nn.gelu], ids=["silu", "gelu"])
def test_equals_the_definition_with_gradients(implementation, activation):
    lhs, w_gate, w_up, sizes = gated_operands([7, 0, 9, 1], 20)

    def ours(*floats):
        return grouped_gated(*floats, sizes, activation, implementation=implementation)

    def oracle(*floats):
        return by_definition(*floats, [7, 0, 9, 1], activation)

    wanted, pull_wanted = jax.vjp(oracle, lhs, w_gate, w_up)
    got, pull = jax.vjp(ours, lhs, w_gate, w_up)
    assert_close(got, wanted, "float32")
    for one, other in zip(pull(wanted), pull_wanted(wanted), strict=True):
        assert_close(one, other, "float32")


@pytest.mark.parametrize("implementation", [n for n in ANYWHERE if n != "ref"])
def test_only_the_wanted_groups_get_a_gradient(implementation):
    lhs, w_gate, w_up, sizes = gated_operands(CASES["no_block_multiple"])
    groups = jnp.asarray([True, False, True, False, True])

    def gradients(name, groups):
        def loss(w_gate, w_up):
            out = grouped_gated(
                lhs, w_gate, w_up, sizes, jax.nn.silu, implementation=name, groups=groups
            )
            return jnp.sum(out**2)

        return jax.jit(jax.grad(loss, (0, 1)))(w_gate, w_up)

    whole, part = gradients("ref", None), gradients(implementation, groups)
    for one, other in zip(part, whole, strict=True):
        assert_close(one, jnp.where(groups[:, None, None], other, 0), "float32")


def test_matrices_of_two_shapes_are_named():
    lhs, w_gate, w_up, sizes = gated_operands([3, 4], 7)
    with pytest.raises(ValueError, match=r"w_gate is \[2, 24, 40\] and w_up \[2, 24, 39\]"):
        grouped_gated(lhs, w_gate, w_up[..., :39], sizes, jax.nn.silu)
