"""The GPU kernels: by their definition in Pallas' interpreter, and compiled for an H100."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.gpu_tiles import Tile
from moejax.ops.grouped_matmul import grouped_matmul
from moejax.ops.grouped_matmul_gpu import (
    grouped_matmul_gpu,
    multiply_rows,
    outer_by_group,
    visits,
    wanted_spans,
)
from moejax.ops.grouped_matmul_ref import grouped_matmul_ref
from tests.aot.test_topology import run_for
from tests.ops.test_grouped_matmul import CASES, NUM_ROWS, assert_close, operands


@functools.partial(jax.jit, static_argnums=0)
def pulled_back(kernel, lhs, rhs, sizes, groups, d_out):
    out, pull = jax.vjp(lambda x, w: kernel(x, w, sizes, groups), lhs, rhs)
    return out, *pull(d_out)


def interpreted(lhs, rhs, sizes, groups):
    return grouped_matmul_gpu(lhs, rhs, sizes, groups, True)


def both(lhs, rhs, sizes, groups=None):
    d_out = np.random.default_rng(3).normal(size=(lhs.shape[0], rhs.shape[2]))
    operands = (lhs, rhs, sizes, groups, jnp.asarray(d_out, lhs.dtype))
    return pulled_back(interpreted, *operands), pulled_back(grouped_matmul_ref, *operands)


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_equals_the_definition_with_gradients(sizes):
    """K and N, 24 and 40, are no multiples of any tile."""
    groups = jnp.arange(len(sizes)) % 2 == 0
    got, wanted = both(*operands(sizes, NUM_ROWS), groups)
    for ours, oracle in zip(got, wanted, strict=True):
        assert ours.shape == oracle.shape and ours.dtype == oracle.dtype
        assert_close(ours, oracle, "float32")
    np.testing.assert_array_equal(got[2][1::2], 0)


def test_bfloat16_keeps_its_type_and_sums_in_float32():
    lhs, rhs, sizes = operands([60, 0, 71], 134, dtype="bfloat16", k=72, n=130)
    got, _ = both(lhs, rhs, sizes)
    _, wanted = both(*(a.astype(jnp.float32) for a in (lhs, rhs)), sizes)
    for ours, exact in zip(got, wanted, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert_close(ours, exact, "bfloat16")


@pytest.mark.parametrize("tile", [Tile(16, 16, 16, 4, 2), Tile(64, 32, 16, 4, 2)])
def test_any_tile_gives_the_same(tile):
    lhs, rhs, sizes = operands([129, 31, 3, 132, 5], NUM_ROWS)
    out = multiply_rows([(lhs, rhs)], sizes, transposed=False, interpret=True, tile=tile)
    assert_close(out, grouped_matmul_ref(lhs, rhs, sizes), "float32")
    d_rhs = outer_by_group(lhs, out, sizes, None, interpret=True, tile=tile)
    _, pull = jax.vjp(lambda w: grouped_matmul_ref(lhs, w, sizes), rhs)
    assert_close(d_rhs, pull(out)[0], "float32")


@pytest.mark.parametrize("n", [300, 384, 500])
def test_half_tiles_give_the_same(n):
    """Rows: 200 are one tile and a half, 64 and 1 half of one; columns: the last tile by n."""
    lhs, rhs, sizes = operands([200, 64, 1, 0], 301, n=n)
    tile = Tile(128, 256, 16, 8, 3)
    out = multiply_rows([(lhs, rhs)], sizes, transposed=False, interpret=True, tile=tile)
    assert_close(out, grouped_matmul_ref(lhs, rhs, sizes), "float32")
    d_rhs = outer_by_group(lhs, out, sizes, None, interpret=True, tile=tile)
    _, pull = jax.vjp(lambda w: grouped_matmul_ref(lhs, w, sizes), rhs)
    assert_close(d_rhs, pull(out)[0], "float32")


def test_rows_past_the_last_group_stay_out_even_if_not_finite():
    lhs, rhs, sizes = operands([10, 20], 35)
    (out, d_lhs, d_rhs), _ = both(lhs.at[30:].set(jnp.nan), rhs, sizes)
    np.testing.assert_array_equal(out[30:], 0)
    np.testing.assert_array_equal(d_lhs[30:], 0)
    assert np.isfinite(out).all() and np.isfinite(d_rhs).all()


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_every_row_is_in_one_tile_of_its_own_group(sizes):
    """The law of the table, and that its static length is always enough."""
    group, start, end = np.asarray(visits(jnp.asarray(sizes, jnp.int32), NUM_ROWS, 16))
    owner = np.full(NUM_ROWS, -1)
    for g, first, last in zip(group, start, end, strict=True):
        rows = np.arange(first, min(first + 16, last))
        assert (owner[rows] == -1).all()
        owner[rows] = g
    left = NUM_ROWS - sum(sizes)
    np.testing.assert_array_equal(owner, np.repeat(np.arange(len(sizes) + 1), [*sizes, left]))


def test_an_unwanted_group_has_no_rows_to_walk_over():
    sizes, groups = jnp.array([5, 0, 9]), jnp.array([True, True, False])
    group, start, end = np.asarray(wanted_spans(sizes, groups, 14))
    assert dict(zip(group.tolist(), (end - start).tolist(), strict=True)) == {0: 5, 1: 0, 2: 0}


def test_no_gpu_and_no_such_type_are_said():
    lhs, rhs, sizes = operands([2, 3])
    with pytest.raises(NotImplementedError, match="compiled for gpu devices and these are cpu"):
        grouped_matmul(lhs, rhs, sizes, implementation="gpu")
    with pytest.raises(NotImplementedError, match="not int8: cast the operands"):
        interpreted(lhs.astype(jnp.int8), rhs.astype(jnp.int8), sizes, None)


@pytest.mark.parametrize("shape", [(256, 7168, 2048, 64), (1, 1024, 8, 2**21)])
def test_arrays_past_int32_offsets_are_refused_with_the_number(shape):
    """256 experts of DeepSeek-V3's width: the offset of the last would come out negative."""
    num_groups, k, n, num_rows = shape
    abstract = jax.ShapeDtypeStruct
    lhs, rhs = abstract((num_rows, k), jnp.bfloat16), abstract((num_groups, k, n), jnp.bfloat16)
    count = max(num_groups * k * n, num_rows * k)
    with pytest.raises(NotImplementedError, match=f"has {count}: shard the rows or the groups"):
        jax.eval_shape(grouped_matmul_gpu, lhs, rhs, abstract((num_groups,), jnp.int32))


PROGRAM = """
import os, sys
from pathlib import Path

from moejax.aot import ptx

dump, dtype, shape = Path(sys.argv[1]), sys.argv[2], [int(n) for n in sys.argv[3].split(",")]
os.environ["XLA_FLAGS"] = ptx.dump_flags(dump)
import jax
from jax.sharding import PartitionSpec as P

from moejax.aot import compile, topology
from moejax.ops.grouped_matmul import grouped_matmul

mesh = topology.mesh("h100x1", {"data": 1})
rows, k, n, experts = shape

def both(x, w, sizes, d_out):
    product = lambda x, w: grouped_matmul(x, w, sizes, implementation="gpu")
    out, pull = jax.vjp(product, x, w)
    return out, *pull(d_out)

shapes = [((rows, k), dtype), ((experts, k, n), dtype), ((experts,), "int32"), ((rows, n), dtype)]
compiled = compile.compile_for(both, *(compile.abstract(*each, mesh, P()) for each in shapes))
print("temp", compile.memory(compiled).temp_bytes)
for name, kernel in ptx.kernels(dump, "grouped_matmul").items():
    print("kernel", name, *kernel)
"""


@pytest.mark.aot
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", ["8192,2048,1024,64", "300,72,200,8"])
def test_compiles_for_an_h100_on_tensor_cores_without_spills(tmp_path, dtype, shape):
    """jax.lax.ragged_dot takes 2 GiB forward and 4 GiB more backward for the first shape."""
    done = run_for("h100x1", PROGRAM, str(tmp_path), dtype, shape)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    (temp,) = (int(line[1]) for line in lines if line[0] == "temp")
    kernels = {line[1]: (int(line[2]), int(line[3])) for line in lines if line[0] == "kernel"}
    assert set(kernels) == {"grouped_matmul", "grouped_matmul_dx", "grouped_matmul_dw"}
    assert all(wgmma > 0 and spills == 0 for wgmma, spills in kernels.values()), kernels
    assert temp < 64 * 1024
