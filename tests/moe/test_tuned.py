"""Stacks of which some experts are trained: the function of the merged stack, dW of those only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import tuned as tuned_module
from moejax.moe.tuned import merged, tuned_matmul, weight_gradient
from moejax.ops.grouped_matmul import grouped_matmul
from tests.draws import normal

E, K, N, R = 6, 5, 4, 40
SIZES = np.array([7, 0, 12, 3, 9, 6], np.int32)
IDS = {
    "some": [0, 2, 5],
    "neighbours": [2, 3],
    "empty": [1, 4],
    "padded": [4, E, E],
    "elsewhere": [-3, -1, 0, 3, 7, 9],
    "all": [0, 1, 2, 3, 4, 5],
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("implementation", ["cpu", "ref"])
def test_it_is_the_merged_stack_forward_and_gradient(name, implementation):
    ids = np.array(IDS[name], np.int32)
    lhs, stack, mixer = normal((R, K), 0), normal((E, K, N), 1), normal((R, N), 2)
    own = normal((len(ids), K, N), 3)

    def ours(lhs, own):
        out = tuned_matmul(implementation, lhs, stack, own, jnp.asarray(ids), jnp.asarray(SIZES))
        return jnp.sum(out * mixer), out

    def whole(lhs, own):
        out = grouped_matmul(lhs, merged(stack, own, jnp.asarray(ids)), jnp.asarray(SIZES))
        return jnp.sum(out * mixer), out

    found, wanted = (jax.jit(jax.grad(f, (0, 1), has_aux=True))(lhs, own) for f in (ours, whole))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_no_other_expert_s_gradient_is_asked_for(monkeypatch):
    asked = []

    def spy(lhs, rhs, sizes, *, implementation=None, groups=None):
        if groups is not None:
            asked.append((np.asarray(sizes), np.asarray(groups)))
        return grouped_matmul(lhs, rhs, sizes, implementation=implementation, groups=groups)

    monkeypatch.setattr(tuned_module, "grouped_matmul", spy)
    ids = jnp.array([0, 2, 5], jnp.int32)
    weight_gradient(normal((R, K), 0), normal((R, N), 1), ids, jnp.asarray(SIZES), "cpu")
    ((sizes, groups),) = asked
    assert sizes[groups].tolist() == SIZES[[0, 2, 5]].tolist()
    assert sizes[~groups].sum() == SIZES[1] + SIZES[3] + SIZES[4]
