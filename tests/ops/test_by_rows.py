"""Products by rows: the same as without, in a program that copies nothing first."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.platform import compiling_for
from moejax.ops import by_rows

FORMS = {"...d,df->...f": (6, 5), "...d,fd->...f": (5, 6), "...d,dhc->...hc": (6, 2, 3)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 3, 2)])
def test_value_and_gradients_are_einsums(form, lead):
    x = jax.random.normal(jax.random.key(0), (*lead, 6))
    w = jax.random.normal(jax.random.key(1), FORMS[form])

    def both(product):
        return jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(product(form, x, w))), (0, 1))(x, w)

    value, grads = both(by_rows.einsum)
    wanted, wanted_grads = both(jnp.einsum)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for mine, theirs in zip(grads, wanted_grads, strict=True):
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_matmul_of_one_matrix_and_of_many():
    x = jax.random.normal(jax.random.key(0), (2, 3, 6))
    for shape in ((6, 5), (2, 6, 5)):
        w = jax.random.normal(jax.random.key(1), shape)
        np.testing.assert_allclose(by_rows.matmul(x, w), x @ w, rtol=1e-5, atol=1e-6)


def _copies(product) -> int:
    """Of the program of the gradient on this CPU."""
    x, w = jnp.ones((4, 64, 96)), jnp.ones((96, 256))
    grad = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(product(x, w))), (0, 1)))
    text = grad.lower(w, x).compile().as_text()
    return len(re.findall(r" = \S+ (?:copy|transpose)\(", text))


def test_no_copy_before_the_gradient_of_the_matrix():
    if jax.default_backend() != "cpu":
        pytest.skip("needs a CPU, whose compiler it is about")
    with compiling_for("tpu"):
        assert _copies(by_rows.matmul) == _copies(jnp.matmul) > 0
    assert _copies(by_rows.matmul) == 0
