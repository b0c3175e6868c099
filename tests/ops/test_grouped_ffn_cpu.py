"""Experts a block of rows at a time, against the products one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.grouped_ffn_cpu import grouped_ffn_cpu, heights
from moejax.ops.grouped_matmul import grouped_matmul
from tests.ops.test_grouped_matmul import assert_close

# Sizes of the groups, and rows in all.
CASES = {
    "rows_of_nobody": ([5, 0, 40, 100, 3], 160),
    "all_to_the_last": ([0, 0, 7], 7),
    "one_row_each": ([1] * 5, 9),
    "every_height": ([300, 213], 520),
    "nothing": ([0, 0], 4),
}


def arrays(sizes, num_rows, dtype):
    rng = np.random.default_rng(0)
    shapes = ((num_rows, 12), (len(sizes), 12, 20), (len(sizes), 12, 20), (len(sizes), 20, 12))
    return [jnp.asarray(0.5 * rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("activation", [jax.nn.silu, jax.nn.gelu], ids=["silu", "gelu"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_products_one_by_one(name, activation):
    sizes, num_rows = CASES[name]
    groups = jnp.asarray(sizes)
    x, *ws = arrays(sizes, num_rows, jnp.float32)
    # What stands in rows of nobody must touch nothing.
    dirty = x.at[sum(sizes) :].set(jnp.nan)

    def times(x, w):
        return grouped_matmul(x, w, groups, implementation="ref")

    def oracle(x, gate, up, down):
        return times(activation(times(x, gate)) * times(x, up), down)

    def ours(x, *ws):
        return grouped_ffn_cpu(activation, x, *ws, groups)

    wanted, pull_wanted = jax.vjp(oracle, x, *ws)
    assert_close(ours(dirty, *ws), wanted, "float32")
    got, pull = jax.vjp(ours, dirty, *ws)
    assert_close(got, wanted, "float32")
    for one, other in zip(pull(wanted + 1), pull_wanted(wanted + 1), strict=True):
        assert_close(one, other, "float32")


def test_bfloat16_sums_in_float32():
    sizes, num_rows = CASES["every_height"]
    exact = arrays(sizes, num_rows, jnp.float32)
    low = [a.astype(jnp.bfloat16) for a in exact]
    exact = [a.astype(jnp.float32) for a in low]
    run = lambda floats: grouped_ffn_cpu(jax.nn.silu, *floats, jnp.asarray(sizes))  # noqa: E731
    got = run(low)
    assert got.dtype == jnp.bfloat16
    error = jnp.abs(got.astype(jnp.float32) - run(exact)).max()
    assert error < 0.02 * jnp.abs(run(exact)).max()


def test_heights_fall_and_fit_the_rows():
    assert heights(8192, 8) == (512, 128, 32) and heights(24576, 64) == (256, 64, 16)
    assert heights(7, 3) == (7,) and heights(64, 8) == (16,)
