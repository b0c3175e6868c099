"""The TPU kernels in the TPU interpreter, with its race detector, over the cases of the suite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from moejax.ops import tpu_tables, tpu_tiles
from moejax.ops.grouped_gated import grouped_gated
from moejax.ops.grouped_matmul import grouped_matmul
from moejax.ops.grouped_matmul_ref import grouped_matmul_ref
from moejax.ops.grouped_matmul_tpu import (
    PRODUCT,
    grouped_gated_tpu,
    grouped_matmul_tpu,
    grouped_outer_tpu,
    prepared_tpu,
)
from moejax.ops.grouped_outer import grouped_outer
from moejax.ops.tpu_outer import outer
from moejax.ops.tpu_rows import multiply
from moejax.ops.tpu_tiles import OuterTiles, Tiles
from moejax.ops.tpu_visits import Wanted
from tests.aot.test_topology import run_for
from tests.ops.test_grouped_matmul import CASES, NUM_ROWS, assert_close, by_hand, operands

K, N = 136, 200  # no multiple of a tile
HEIGHTS, FEWER = (256, 128, 96, 64, 32), (256, 64, 32)
TILES = Tiles((64, 32), 128, 48 << 20)
# One of each: groups that share a block, that are empty, that no core has, and many small ones.
FAST = ("no_block_multiple", "empty_middle_and_last")


def slow(names, fast):
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


def interpreted():
    return pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)


@pytest.mark.parametrize("case", slow(CASES, FAST))
def test_forward_equals_the_definition_without_a_race(case):
    lhs, rhs, group_sizes = operands(CASES[case], NUM_ROWS, k=K, n=N)
    (got,) = multiply(PRODUCT, [lhs], [rhs], group_sizes, TILES, interpreted())
    assert_close(got, by_hand(lhs, rhs, CASES[case]), "float32")
    assert not interpreter.races.races_found


def test_a_rest_of_three_and_four_visits():
    """What groups leave of the tallest height: 208 and 160 rows; a core's part begins anew."""
    sizes = [208, 0, 161, 70]
    lhs, rhs, group_sizes = operands(sizes, 448, "bfloat16", 24, 40)
    tiles = TILES._replace(heights=FEWER)
    (got,) = multiply(PRODUCT, [lhs], [rhs], group_sizes, tiles, interpreted())
    assert_close(got, by_hand(lhs, rhs, sizes), "bfloat16")
    assert not interpreter.races.races_found


SUMS = ("k", True, False, False), ("n", False, True, False), ("k", False, True, True)


@pytest.mark.parametrize(("split", "masked", "added", "begins"), SUMS)
@pytest.mark.parametrize("case", slow(CASES, ("no_block_multiple",)))
def test_sums_of_a_group_equal_the_definition_without_a_race(case, split, masked, added, begins):
    dtype = "bfloat16" if added else "float32"  # and added in float32
    lhs, _, group_sizes = operands(CASES[case], NUM_ROWS, dtype, K, N)
    d_out = operands(CASES[case], NUM_ROWS, dtype, N, K, seed=1)[0]
    groups = jnp.arange(group_sizes.size) % 2 == 0 if masked else None
    tiles = OuterTiles((128, 64), 128, 128, split, 48 << 20)
    before = operands(CASES[case], NUM_ROWS, k=K, n=N, seed=2)[1] if added else None
    if begins:  # nothing was added yet, and room for it holds anything
        before = jnp.full_like(before, jnp.nan)
    how = (tiles, interpreted(), jnp.float32, before, jnp.array(begins))
    got = outer(lhs, d_out, group_sizes, groups, *how)
    zeros, exact = jnp.zeros((group_sizes.size, K, N)), lhs.astype(jnp.float32)
    pull = jax.vjp(lambda w: grouped_matmul_ref(exact, w, group_sizes, groups), zeros)[1]
    sums = pull(d_out.astype(jnp.float32))[0]
    assert_close(got, sums + (before if added and not begins else 0.0), "float32")
    assert not interpreter.races.races_found


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one_row", "none", "one_group"])
def test_gradients_are_those_of_the_definition(case):
    lhs, rhs, group_sizes = operands(CASES[case], NUM_ROWS, k=K, n=N)
    d_out = operands(CASES[case], NUM_ROWS, k=N, n=K, seed=1)[0]

    def pulled(kernel):
        return jax.vjp(lambda a, b: kernel(a, b, group_sizes, None), lhs, rhs)[1](d_out)

    found = pulled(lambda *a: grouped_matmul_tpu(*a, interpreted()))
    for got, expected in zip(found, pulled(grouped_matmul_ref), strict=True):
        assert_close(got, expected, "float32")
    assert not interpreter.races.races_found


def gated(num_rows=40):
    lhs, w_gate, sizes = operands([17, 0, 20], num_rows, k=24, n=40)
    w_up = operands([17, 0, 20], num_rows, k=24, n=40, seed=5)[1]

    def ours(*floats):
        return grouped_gated_tpu(*floats, sizes, jax.nn.silu, None, interpreted())

    def oracle(*floats):
        return grouped_gated(*floats, sizes, jax.nn.silu, implementation="ref")

    return ours, oracle, (lhs, w_gate, w_up)


def test_gated_forward_in_one_kernel_without_a_race():
    ours, oracle, floats = gated()
    assert_close(ours(*floats), oracle(*floats), "float32")
    assert not interpreter.races.races_found


@pytest.mark.slow
def test_gated_gradients_without_a_race():
    ours, oracle, floats = gated()
    wanted, pull_wanted = jax.vjp(oracle, *floats)
    got, pull = jax.vjp(ours, *floats)
    assert_close(got, wanted, "float32")
    for one, other in zip(pull(wanted), pull_wanted(wanted), strict=True):
        assert_close(one, other, "float32")
    assert not interpreter.races.races_found


def test_bfloat16_and_fewer_rows_than_a_block():
    lhs, rhs, group_sizes = operands([3, 0, 6], 10, "bfloat16", K, N)
    got = grouped_matmul_tpu(lhs, rhs, group_sizes, None, interpreted())
    assert_close(got, by_hand(lhs, rhs, [3, 0, 6]), "bfloat16")


@pytest.mark.slow
def test_sums_of_two_calls_are_added_in_float32():
    lhs, _, group_sizes = operands([3, 0, 6], 10, "bfloat16", 24, 40)
    d_out = operands([3, 0, 6], 10, "bfloat16", 40, 24, seed=1)[0]
    exact = [a.astype(jnp.float32) for a in (lhs, d_out)]
    sums = grouped_outer(*exact, group_sizes, implementation="ref")
    first = grouped_outer_tpu(lhs, d_out, group_sizes, None, None, interpreted())
    second = grouped_outer_tpu(lhs, d_out, group_sizes, first, None, interpreted())
    assert_close(first, sums, "float32")
    assert_close(second, 2 * sums, "float32")
    assert not interpreter.races.races_found


def test_sizes_prepared_once_serve_every_product_of_a_pass(monkeypatch):
    sizes = [3, 0, 29, 6]
    lhs, rhs, group_sizes = operands(sizes, 40, "bfloat16", K, N)
    hidden, w_down, _ = operands(sizes, 40, "bfloat16", N, K, seed=1)

    def forward(group_sizes):
        gated = grouped_gated_tpu(lhs, rhs, rhs, group_sizes, jax.nn.silu, None, True)
        return gated, grouped_matmul_tpu(hidden, w_down, group_sizes, None, True)

    def backward(group_sizes):
        up = lambda lhs: grouped_matmul_tpu(lhs, rhs, group_sizes, None, True)  # noqa: E731
        out, pull = jax.vjp(up, lhs)
        before = jnp.ones(rhs.shape, jnp.float32)
        return out, *pull(out), grouped_outer_tpu(lhs, out, group_sizes, before, None, True)

    wanted = forward(group_sizes), backward(group_sizes)
    once = [prepared_tpu(group_sizes, lhs, N, backward, True) for backward in (False, True)]
    jax.clear_caches()
    monkeypatch.delattr(tpu_tables, "tables")
    found = forward(once[0]), backward(once[1])
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("heights", [HEIGHTS, FEWER])
def test_visits_cover_every_row_once_and_the_cores_share_them_evenly(heights):
    rng = np.random.default_rng(0)
    for _ in range(30):
        sizes = rng.multinomial(3900, rng.dirichlet(np.full(16, 0.3)))
        visits = tpu_tables.visits(jnp.asarray(sizes), Wanted(False, 4096, heights))
        cost, blocks = [0, 0], [set(), set()]
        covered = np.zeros((17, 256), int)  # per group and block
        for core in range(2):
            for v in range(visits.num[core]):
                group, kind, fetch, skip, lead, count = (field[core, v] for field in visits[:6])
                first = fetch + skip + lead
                assert 0 <= fetch <= 256 - 16 and skip >= 0 and count > 0
                if group < 16:
                    size = heights[kind] // 16
                    assert skip + size <= 16 and lead + count <= size and count >= size - 1
                    cost[core] += heights[kind] + 9
                covered[group, first : first + count] += 1
                blocks[core] |= set(range(first, first + count))
        assert not blocks[0] & blocks[1] and blocks[0] | blocks[1] == set(range(256))
        ends = np.cumsum(np.append(sizes, 196))
        for group, (start, end) in enumerate(zip(np.append(0, ends), ends, strict=False)):
            inside = np.arange(start // 16, -(-end // 16)) if end > start else []
            np.testing.assert_array_equal(np.flatnonzero(covered[group]), inside)
        assert covered.max() == 1 and max(cost) <= 1.06 * sum(cost) / 2


@pytest.mark.parametrize("sizes", [[1] * 63 + [7000], [7000] + [1] * 63])
def test_cores_share_a_large_group_beside_many_tiny_ones(sizes):
    visits = tpu_tables.visits(jnp.asarray(sizes), Wanted(False, 8192, HEIGHTS))
    costs = [
        sum(HEIGHTS[kind] + 9 for kind in visits.kind[core, : visits.num[core]] if kind < 5)
        for core in range(2)
    ]
    assert max(costs) <= 1.06 * sum(costs) / 2


def test_no_visit_of_a_group_that_is_not_asked_for_sums_a_row():
    sizes, groups = jnp.array([700, 0, 90, 300]), jnp.array([True, True, False, True])
    visits = tpu_tables.visits(sizes, Wanted(True, 1120, (256, 128)), groups)
    kinds = [int(k) for k in visits.kind[0, : visits.num[0]]]
    # 256, 256 and then 188 rows; nothing of the second; the third is not asked for; 256 and then 44
    assert kinds == [2, 2, 0, 3, 3, 2, 1]


def test_tiles_divide_what_the_cores_share_and_fit():
    assert tpu_tiles.rows_tiles(512, 2048, 1408, "bfloat16").columns == 1408
    assert tpu_tiles.rows_tiles(512, 2048, 1408, "bfloat16").heights == HEIGHTS
    assert tpu_tiles.rows_tiles(3200, 2048, 1408, "bfloat16").heights == FEWER
    assert tpu_tiles.rows_tiles(40, 2048, 1408, "bfloat16").heights[0] == 128
    assert tpu_tiles.outer_tiles(2048, 1408, "bfloat16")[1:4] == (1024, 1408, "k")
    assert tpu_tiles.outer_tiles(1408, 2048, "bfloat16")[1:4] == (1408, 1024, "n")
    assert tpu_tiles.outer_tiles(1408, 2048, "bfloat16", True)[1:4] == (1408, 1024, "n")


def test_what_the_kernel_cannot_do_is_said():
    lhs, rhs, group_sizes = operands([3, 4], 8, "float16")
    with pytest.raises(NotImplementedError, match="float16"):
        grouped_matmul_tpu(lhs, rhs, group_sizes)
    with pytest.raises(NotImplementedError, match="VMEM"):
        jax.eval_shape(
            grouped_matmul_tpu,
            jax.ShapeDtypeStruct((8, 10**6), jnp.float32),
            jax.ShapeDtypeStruct((2, 10**6, 8), jnp.float32),
            group_sizes,
        )
    with pytest.raises(NotImplementedError, match="tpu devices and these are cpu"):
        grouped_matmul(lhs, rhs, group_sizes, implementation="tpu")
    with pytest.raises(NotImplementedError, match="tpu devices and these are cpu"):
        grouped_gated(lhs, rhs, rhs, group_sizes, jax.nn.silu, implementation="tpu")


_COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
from moejax.aot import compile as aot, topology
from moejax.ops.grouped_gated import grouped_gated
from moejax.ops.grouped_matmul import grouped_matmul
from moejax.ops.grouped_outer import grouped_outer

mesh = Mesh(topology.devices(sys.argv[1])[:1], ("one",))
for dtype, (m, k, n, e) in [("bfloat16", (4096, 2048, 1408, 8)), ("float32", (300, 136, 200, 64))]:
    def step(x, gate, up, down, sizes, groups, d_y, total):
        def loss(x, gate, up, down):
            how = {"implementation": "tpu", "groups": groups}
            y = grouped_gated(x, gate, up, sizes, jax.nn.silu, **how)
            y = grouped_matmul(y, down, sizes, **how)
            return jnp.sum(y.astype(jnp.float32) ** 2)
        total = grouped_outer(x, d_y, sizes, total, implementation="tpu")
        return jax.grad(loss, (0, 1, 2, 3))(x, gate, up, down), total

    args = [aot.abstract(s, d, mesh, P()) for s, d in
            [((m, k), dtype), ((e, k, n), dtype), ((e, k, n), dtype), ((e, n, k), dtype),
             ((e,), jnp.int32), ((e,), jnp.bool_), ((m, n), dtype), ((e, k, n), jnp.float32)]]
    text = aot.compile_for(step, *args).as_text()
    names = ("grouped_gated", "grouped_gated_dx", "grouped_matmul_dx", "grouped_matmul_dw")
    print(dtype, [name for name in names if name in text])
"""


@pytest.mark.aot
@pytest.mark.parametrize(
    "name",
    ["v6e:2x2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("v5e:2x2", "v5p:2x2x1"))],
)
def test_forward_and_gradient_compile(name):
    done = run_for(name, _COMPILE, name)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    wanted = "['grouped_gated', 'grouped_gated_dx', 'grouped_matmul_dx', 'grouped_matmul_dw']"
    assert lines == [f"bfloat16 {wanted}", f"float32 {wanted}"], done.stdout


_TABLES = """
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
from moejax.aot import compile as aot, topology
from moejax.ops import tpu_tables
from moejax.ops.tpu_visits import Wanted

mesh = Mesh(topology.devices("v5e:2x2")[:1], ("one",))
sizes = aot.abstract((8,), jnp.int32, mesh, P())
rows, sums = ((256, 128, 96, 64, 32), (384, 256, 128))
wanted = tuple(Wanted(of_sums, 4096, h) for of_sums, h in ((False, rows), (True, sums)))
text = aot.compile_for(lambda sizes: tpu_tables.tables(sizes, None, wanted, False), sizes).as_text()
print(text.count('"tpu_custom_call"'), text.count(" fusion("), text.count(" while("))
"""


@pytest.mark.aot
def test_tables_of_visits_are_one_program():
    """Each of XLA's own takes a TPU about 2,100 cycles, a visit of 256 rows 11,700."""
    done = run_for("v5e:2x2", _TABLES)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels, fusions, loops = map(int, done.stdout.split())
    assert kernels == 1 and fusions <= 1 and loops == 0, done.stdout
