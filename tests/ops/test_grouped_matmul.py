"""One suite for every implementation of the grouped matmul: forward and both gradients."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from moejax.core.platform import compiling_for
from moejax.core.precision import TOLERANCE
from moejax.ops import grouped_matmul as module
from moejax.ops import grouped_matmul_cpu as cpu
from moejax.ops.grouped_matmul import IMPLEMENTATIONS, PLATFORM, grouped_matmul
from moejax.ops.grouped_outer import grouped_outer

# The others have suites of their own over the same cases.
ANYWHERE = [name for name in IMPLEMENTATIONS if name not in PLATFORM]

# Group sizes in 300 rows; what they leave over is rows past the last group.
CASES = {
    "even": [60, 60, 60, 60, 60],
    "empty_first": [0, 150, 50, 30, 70],
    "empty_middle_and_last": [80, 0, 0, 71, 0],
    "all_in_one": [0, 0, 300, 0, 0],
    "one_row": [0, 1, 0, 0, 0],
    "one_row_each": [1, 1, 1, 1, 1],
    "no_block_multiple": [129, 31, 3, 132, 5],
    "small_after_large": [290, 1, 2, 1, 1],
    "none": [0, 0, 0, 0, 0],
    "sixty_four": [(7 * e) % 13 % 10 for e in range(64)],
    "one_group": [257],
}
NUM_ROWS = 300


def operands(sizes, num_rows=None, dtype="float32", k=24, n=40, seed=0):
    rng = np.random.default_rng(seed)
    num_rows = sum(sizes) if num_rows is None else num_rows
    lhs = jnp.asarray(rng.normal(size=(num_rows, k)), dtype)
    rhs = jnp.asarray(rng.normal(size=(len(sizes), k, n)), dtype)
    return lhs, rhs, jnp.asarray(sizes, jnp.int32)


def by_hand(lhs, rhs, sizes):
    """The definition in float64 numpy: slices of rows times matrices."""
    lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
    out, start = np.zeros((lhs.shape[0], rhs.shape[2])), 0
    for e, size in enumerate(sizes):
        out[start : start + size] = lhs[start : start + size] @ rhs[e]
        start += size
    return out


def assert_close(got, wanted, dtype):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    bound = TOLERANCE[dtype] * max(1e-30, np.abs(wanted).max())
    np.testing.assert_allclose(got, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_sums_over_two_calls_equal_the_definition(implementation):
    sizes = CASES["empty_middle_and_last"]
    lhs, rhs, group_sizes = operands(sizes, NUM_ROWS)
    d_out = operands(sizes, NUM_ROWS, k=40)[0]
    wanted, start = np.zeros(rhs.shape), 0
    for e, size in enumerate(sizes):
        rows = slice(start, start := start + size)
        wanted[e] = np.asarray(lhs[rows], np.float64).T @ np.asarray(d_out[rows], np.float64)
    once = grouped_outer(lhs, d_out, group_sizes, implementation=implementation)
    assert_close(once, wanted, "float32")
    twice = grouped_outer(lhs, d_out, group_sizes, rhs, implementation=implementation)
    assert_close(twice, wanted + np.asarray(rhs, np.float64), "float32")


@functools.partial(jax.jit, static_argnums=0)  # compiled once per shape, not once per case
def pulled_back(implementation, lhs, rhs, sizes, weight, groups=None):
    def multiply(x, w):
        return grouped_matmul(x, w, sizes, implementation=implementation, groups=groups)

    out, pull = jax.vjp(multiply, lhs, rhs)
    return out, *pull(weight)


def value_and_gradients(implementation, lhs, rhs, sizes, groups=None):
    rng = np.random.default_rng(9)
    weight = jnp.asarray(rng.normal(size=(lhs.shape[0], rhs.shape[2])), lhs.dtype)
    return pulled_back(implementation, lhs, rhs, sizes, weight, groups)


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("implementation", ANYWHERE)
def test_equals_the_definition_with_gradients(implementation, sizes):
    lhs, rhs, group_sizes = operands(sizes, NUM_ROWS)
    got = value_and_gradients(implementation, lhs, rhs, group_sizes)
    assert_close(got[0], by_hand(lhs, rhs, sizes), "float32")
    for ours, oracle in zip(got, value_and_gradients("ref", lhs, rhs, group_sizes), strict=True):
        assert ours.shape == oracle.shape and ours.dtype == oracle.dtype
        assert_close(ours, oracle, "float32")


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_only_the_wanted_groups_get_a_gradient(implementation):
    """The output and the gradient of the rows do not change; the other matrices' is exactly 0."""
    lhs, rhs, sizes = operands([80, 0, 20, 71, 100], NUM_ROWS)
    whole = value_and_gradients("ref", lhs, rhs, sizes)
    for groups in ([True, True, False, True, False], [False] * 5, [True] * 5):
        wanted = jnp.asarray(groups)
        out, d_lhs, d_rhs = value_and_gradients(implementation, lhs, rhs, sizes, wanted)
        assert_close(out, whole[0], "float32")
        assert_close(d_lhs, whole[1], "float32")
        assert_close(d_rhs, jnp.where(wanted[:, None, None], whole[2], 0), "float32")
        np.testing.assert_array_equal(d_rhs[~wanted], 0)


def test_the_cpu_kernel_does_no_work_for_an_unwanted_group():
    num_blocks = cpu._num_wanted_blocks(jnp.array([5, 0, 9]), jnp.array([True, True, False]), 4)
    np.testing.assert_array_equal(num_blocks, [2, 0, 0])


@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_fewer_rows_than_a_block(num_rows):
    lhs, rhs, group_sizes = operands([0, num_rows // 2, 1, 0], num_rows)
    got = value_and_gradients("cpu", lhs, rhs, group_sizes)
    for ours, oracle in zip(got, value_and_gradients("ref", lhs, rhs, group_sizes), strict=True):
        assert_close(ours, oracle, "float32")


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_gradients_are_those_of_finite_differences(implementation):
    with jax.enable_x64(True):
        lhs, rhs, sizes = operands([3, 0, 6], 11, "float64", k=4, n=5)

        def loss(x, w):
            return jnp.sum(jnp.sin(grouped_matmul(x, w, sizes, implementation=implementation)))

        check_grads(loss, (lhs, rhs), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_bfloat16_keeps_its_type_and_sums_in_float32(implementation):
    lhs, rhs, sizes = operands([60, 0, 71], 134, dtype="bfloat16")
    got = value_and_gradients(implementation, lhs, rhs, sizes)
    wanted = value_and_gradients("ref", *(a.astype(jnp.float32) for a in (lhs, rhs)), sizes)
    for ours, exact in zip(got, wanted, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert_close(ours, exact, "bfloat16")


@pytest.mark.parametrize("implementation", ["ragged_dot", "cpu"])
def test_rows_past_the_last_group_stay_out_even_if_not_finite(implementation):
    lhs, rhs, sizes = operands([10, 20], 35)
    lhs = lhs.at[30:].set(jnp.nan)
    out, d_lhs, d_rhs = value_and_gradients(implementation, lhs, rhs, sizes)
    for got in (out, d_lhs):
        np.testing.assert_array_equal(got[30:], 0)
    assert np.isfinite(out).all()
    if implementation == "cpu":  # jax's own lets them into the weights' gradient
        assert np.isfinite(d_rhs).all()


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_under_scan_checkpoint_and_grad(implementation):
    lhs, rhs, sizes = operands([20, 0, 13], k=16, n=16)
    stack = jnp.stack([rhs, -rhs, rhs / 2])

    def loss(stack, transform):
        def body(x, w):
            return jnp.tanh(grouped_matmul(x, w, sizes, implementation=implementation)), None

        return jnp.sum(jax.lax.scan(transform(body), lhs, stack)[0] ** 2)

    plain = jax.jit(jax.grad(lambda s: loss(s, lambda f: f)))(stack)
    rematerialised = jax.jit(jax.grad(lambda s: loss(s, jax.checkpoint)))(stack)
    assert_close(rematerialised, plain, "float32")


def test_the_cpu_kernel_keeps_no_gathered_weights():
    lhs, rhs, sizes = operands([512] * 8, k=128, n=256)

    def loss(lhs, rhs):
        return jnp.sum(grouped_matmul(lhs, rhs, sizes, implementation="cpu") ** 2)

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(lhs, rhs).compile()
    gathered = lhs.shape[0] // 128 * rhs[0].nbytes  # one matrix per block of 128 rows
    activations = 3 * lhs.shape[0] * rhs.shape[2] * 4
    assert compiled.memory_analysis().temp_size_in_bytes < gathered + activations


def test_each_kind_of_device_gets_what_ran_there():
    assert module.chosen(None) == "cpu"
    for name, found in (("gpu", "gpu"), ("tpu", "ragged_dot")):
        with compiling_for(name):
            assert module.chosen(None) == found


def test_none_chooses_and_says_so_once(caplog):
    lhs, rhs, sizes = operands([3, 4])
    module._choose.cache_clear()
    with caplog.at_level(logging.INFO, logger=module.__name__):
        for _ in range(3):
            got = grouped_matmul(lhs, rhs, sizes)
    assert [r.getMessage() for r in caplog.records] == ["grouped_matmul: 'cpu' on the cpu backend"]
    assert_close(got, by_hand(lhs, rhs, [3, 4]), "float32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, w, g: (x, w, g[:2]), ["2 group sizes", "3 matrices"]),
        (lambda x, w, g: (x[:, :7], w, g), ["K=7", "K=24"]),
        (lambda x, w, g: (x[0], w, g), ["(24,)", "(3, 24, 40)"]),
        (lambda x, w, g: (x, w, g.astype(jnp.float32)), ["float32", "integers"]),
        (lambda x, w, g: (x, w, g + 1), ["add up to 12", "9 rows"]),
        (lambda x, w, g: (x, w, g.at[1].set(-3)), ["group 1", "-3 rows"]),
    ],
)
def test_bad_operands_are_named_with_both_numbers(change, words):
    with pytest.raises(ValueError) as caught:
        grouped_matmul(*change(*operands([2, 3, 4])))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("groups", [jnp.ones(2, bool), jnp.ones(3, jnp.int32)])
def test_a_mask_of_groups_that_does_not_fit(groups):
    with pytest.raises(ValueError, match=r"3 matrices; give bool\[3\]"):
        grouped_matmul(*operands([2, 3, 4]), groups=groups)


def test_an_unknown_implementation_lists_the_known():
    with pytest.raises(ValueError, match="'fast'.*ref, ragged_dot, cpu"):
        grouped_matmul(*operands([2, 3]), implementation="fast")
