"""The TPU kernels in the TPU interpreter, with its race detector, over the cases of the suite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from moejax.ops.grouped_matmul import grouped_matmul
from moejax.ops.grouped_matmul_ref import grouped_matmul_ref
from moejax.ops.grouped_matmul_tpu import Tiles, grouped_matmul_tpu, row_visits
from tests.aot.test_topology import run_for
from tests.ops.test_grouped_matmul import CASES, NUM_ROWS, assert_close, by_hand, operands

K, N = 136, 200  # no multiple of a tile
TILES = Tiles(64, 128)


def interpreted():
    return pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_forward_equals_the_definition_without_a_race(sizes):
    lhs, rhs, group_sizes = operands(sizes, NUM_ROWS, k=K, n=N)
    got = grouped_matmul_tpu(lhs, rhs, group_sizes, None, interpreted(), TILES)
    assert_close(got, by_hand(lhs, rhs, sizes), "float32")
    assert not interpreter.races.races_found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "case", ["empty_first", "one_row", "no_block_multiple", "none", "one_group"]
)
def test_gradients_are_those_of_the_definition_without_a_race(case, masked):
    lhs, rhs, group_sizes = operands(CASES[case], NUM_ROWS, k=K, n=N)
    groups = jnp.arange(group_sizes.size) % 2 == 0 if masked else None
    d_out = operands(CASES[case], NUM_ROWS, k=N, n=K, seed=1)[0]

    def pulled(kernel):
        return jax.vjp(lambda a, b: kernel(a, b, group_sizes, groups), lhs, rhs)[1](d_out)

    wanted = pulled(grouped_matmul_ref)
    found = pulled(lambda *a: grouped_matmul_tpu(*a, interpreted(), TILES))
    for got, expected in zip(found, wanted, strict=True):
        assert_close(got, expected, "float32")
    assert not interpreter.races.races_found


def test_bfloat16_and_a_single_tile():
    lhs, rhs, group_sizes = operands([3, 0, 6], 10, "bfloat16", K, N)
    got = grouped_matmul_tpu(lhs, rhs, group_sizes, None, interpreted())
    assert_close(got, by_hand(lhs, rhs, [3, 0, 6]), "bfloat16")


def test_the_cores_share_the_visits_evenly_and_own_their_tiles():
    rng = np.random.default_rng(0)
    for _ in range(30):
        sizes = rng.multinomial(3900, rng.dirichlet(np.full(16, 0.3)))
        visits = row_visits(jnp.asarray(sizes), 4096, 128)
        tiles = [{int(t) for t in visits.row_tile[core, : visits.num[core]]} for core in range(2)]
        assert not tiles[0] & tiles[1] and tiles[0] | tiles[1] == set(range(32))
        busy = [int((visits.group[c, : visits.num[c]] < 16).sum()) for c in range(2)]
        # A tile that many groups share cannot be cut.
        most = np.bincount(np.concatenate([visits.row_tile[c, : visits.num[c]] for c in range(2)]))
        assert abs(busy[0] - busy[1]) <= 2 * most.max()


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


_COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
from moejax.aot import compile as aot, topology
from moejax.ops.grouped_matmul import grouped_matmul

mesh = Mesh(topology.devices(sys.argv[1])[:1], ("one",))
for dtype, (m, k, n, e) in [("bfloat16", (4096, 2048, 1408, 8)), ("float32", (300, 136, 200, 64)),
                            ("bfloat16", (1024, 14336, 4096, 8))]:
    def step(x, w, sizes, groups):
        def loss(x, w):
            y = grouped_matmul(x, w, sizes, implementation="tpu", groups=groups)
            return jnp.sum(y.astype(jnp.float32) ** 2)
        return jax.grad(loss, (0, 1))(x, w)

    args = [aot.abstract(s, d, mesh, P()) for s, d in
            [((m, k), dtype), ((e, k, n), dtype), ((e,), jnp.int32), ((e,), jnp.bool_)]]
    text = aot.compile_for(step, *args).as_text()
    calls = [name for name in ("grouped_matmul_dx", "grouped_matmul_dw") if name in text]
    print(dtype, text.count("tpu_custom_call"), calls)
"""


@pytest.mark.aot
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_forward_and_gradient_compile(name):
    done = run_for(name, _COMPILE, name)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("'grouped_matmul_dx', 'grouped_matmul_dw'" in line for line in lines), done.stdout
