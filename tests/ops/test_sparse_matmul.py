"""One suite for every implementation of products with chosen blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from moejax.core.precision import TOLERANCE
from moejax.ops import sparse_matmul as module
from moejax.ops import sparse_matmul_native as native
from moejax.ops import sparse_matmul_tpu as tpu
from moejax.ops.gated_ffn import gated_ffn
from moejax.ops.sparse_ffn import sparse_ffn
from moejax.ops.sparse_matmul import IMPLEMENTATIONS, sparse_matmul
from moejax.ops.sparse_matmul_gpu import sparse_ffn_gpu, sparse_matmul_gpu
from moejax.ops.sparse_matmul_tpu import sparse_ffn_tpu, sparse_matmul_tpu
from tests.aot.test_topology import run_for

M, P, D = 6, 16, 96
CHOSEN = {"some": [4, 0, 5, 1], "one": [3], "twice": [2, 2, 0], "over": [1, 4, 4, 4]}


def skip_without_compiler(name):
    if name == "native" and native.missing():
        pytest.skip(f"the C++ kernel: {native.missing()}")


def interpreted():
    return pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)


def run(name, x, w, chosen):
    skip_without_compiler(name)
    if name == "tpu":
        return sparse_matmul_tpu(x, w, chosen, interpreted())
    if name == "gpu":
        return sparse_matmul_gpu(x, w, chosen, True)
    return sparse_matmul(x, w, chosen, implementation=name)


def draw(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def close(got, wanted, dtype="float32"):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE[dtype] * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("name", "case", "batch"),
    [
        *[(name, "some", 3) for name in IMPLEMENTATIONS],
        *[(name, "twice", 1) for name in ("cpu", "native")],
        ("native", "over", 2),
        *[pytest.param("tpu", case, 1, marks=pytest.mark.slow) for case in ("one", "twice")],
        *[("gpu", case, batch) for case, batch in (("one", 1), ("twice", 6), ("some", 70))],
    ],
)
def test_both_directions_equal_the_definition(name, case, batch):
    chosen = np.asarray(CHOSEN[case])
    w, x, h = draw(M, P, D), draw(batch, D, seed=1), draw(batch, len(chosen), P, seed=2)
    if case == "over":  # rows under zeros of all of x, and of one
        h = h.at[:, 2:].set(0).at[0, 1].set(0)
    rows = np.asarray(w, np.float64)[chosen]
    into = run(name, x, w, jnp.asarray(chosen))
    assert into.shape == (batch, len(chosen), P)
    close(into, np.einsum("bd,kpd->bkp", np.asarray(x, np.float64), rows))
    close(run(name, h, w, jnp.asarray(chosen)), np.einsum("bkp,kpd->bd", h, rows))
    if name == "tpu":
        assert not interpreter.races.races_found


@pytest.mark.parametrize("name", ["cpu", "tpu", "gpu"])
def test_bfloat16_keeps_its_type_and_sums_in_float32(name):
    chosen = jnp.asarray(CHOSEN["some"])
    w, x = draw(M, P, D, dtype="bfloat16"), draw(1, D, seed=1, dtype="bfloat16")
    got = run(name, x, w, chosen)
    assert got.dtype == jnp.bfloat16
    close(got, run("ref", x.astype("float32"), w.astype("float32"), chosen), "bfloat16")


exact_gelu = functools.partial(jax.nn.gelu, approximate=False)


def ffn_params(gated, biased, seed=0):
    names = ("gate", "up", "down") if gated else ("up", "down")
    params = {f"rows_{name}": draw(M, P, D, seed=seed + i) for i, name in enumerate(names)}
    if biased:
        params |= {f"b_{name}": draw(M, P, seed=9) for name in names[:-1]}
        params["b_down"] = draw(D, seed=8)
    return params


@pytest.mark.parametrize(("gated", "biased"), [(True, False), (False, True)])
@pytest.mark.parametrize("name", ["ref", "native", "tpu", "gpu"])
@pytest.mark.parametrize("batch", [2, 6])
def test_a_layer_is_its_masked_self(name, gated, biased, batch):
    """Against all neurons with the unchosen ones times zero, as the masked path has it."""
    skip_without_compiler(name)
    params, x = ffn_params(gated, biased), draw(batch, D, seed=3)
    chosen = jnp.asarray([4, 0, 5])
    weight = jnp.asarray([[1.0, 0.0, 1.0], [0.5, 1.0, 0.0]] * (batch // 2))
    # Batches of 6: one that Pallas' Triton cannot compile.
    activation = jax.nn.silu if gated else jax.nn.relu if batch == 2 else exact_gelu
    flat = {k: v.reshape(-1, D) for k, v in params.items() if k.startswith("rows")}

    def into(which):
        bias = params[f"b_{which}"].reshape(-1) if biased else 0
        return x @ flat[f"rows_{which}"].T + bias

    h = activation(into("gate")) * into("up") if gated else activation(into("up"))
    kept = np.zeros((batch, M))
    kept[:, np.asarray(chosen)] = weight
    wanted = (h * np.repeat(kept, P, 1)) @ flat["rows_down"] + params.get("b_down", 0)
    if name == "tpu":
        got = sparse_ffn_tpu(params, x, chosen, activation, weight, interpreted())
        got = got + params.get("b_down", 0)
        assert not interpreter.races.races_found
    elif name == "gpu":
        got = sparse_ffn_gpu(params, x, chosen, activation, weight, True) + params.get("b_down", 0)
    else:
        got = sparse_ffn(params, x, chosen, activation, weight_BK=weight, implementation=name)
    close(got, wanted)


def test_blocks_that_a_tpu_copies_slowly_are_told_once(caplog):
    tpu._warn_of_small.cache_clear()
    for rows in (32, 32, 64):  # 36, 36 and 72 KiB
        w = jax.ShapeDtypeStruct((4, rows, 576), jnp.bfloat16)
        tpu._check(w)
    (said,) = caplog.messages
    assert "36.0 KiB" in said and "64 KiB" in said


def test_all_blocks_are_the_dense_layer():
    params, x = ffn_params(True, False), draw(3, D, seed=3)
    dense = {f"w_{n}": params[f"rows_{n}"].reshape(-1, D).T for n in ("gate", "up")}
    dense["w_down"] = params["rows_down"].reshape(-1, D)
    got = sparse_ffn(params, x, jnp.arange(M), jax.nn.silu)
    close(got, gated_ffn(dense, x, jax.nn.silu))


def test_none_takes_the_compiled_kernel_or_says_why_not(monkeypatch):
    assert module.chosen(None, jnp.float32) == ("cpu" if native.missing() else "native")
    assert module.chosen(None, jnp.bfloat16) == "cpu"
    module._choose.cache_clear()
    monkeypatch.setattr(native, "missing", lambda: "no C++ compiler is installed")
    try:
        assert module.chosen(None, jnp.float32) == "cpu"
        with pytest.raises(ValueError, match="no C\\+\\+ compiler.*use implementation='cpu'"):
            sparse_matmul(draw(1, D), draw(M, P, D), jnp.arange(2), implementation="native")
    finally:
        module._choose.cache_clear()


@pytest.mark.parametrize(
    ("x", "chosen", "said"),
    [
        ((1, D + 1), [0], f"D={D + 1} columns and w D={D}"),
        ((1, 3, P), [0, 1], "for 2 chosen blocks of 16 rows"),
        ((1, D), [0.5], "give integers"),
        ((D,), [0], "not shapes"),
    ],
)
def test_operands_that_do_not_fit_are_one_line(x, chosen, said):
    with pytest.raises(ValueError, match=said):
        sparse_matmul(jnp.zeros(x), jnp.zeros((M, P, D)), jnp.asarray(chosen))
    with pytest.raises(NotImplementedError, match="compiled for tpu devices"):
        run_on_tpu = jnp.zeros((1, D)), jnp.zeros((M, P, D)), jnp.arange(1)
        sparse_matmul(*run_on_tpu, implementation="tpu")


PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from moejax.aot import compile as aot, topology
from moejax.ops.sparse_ffn import sparse_ffn
from moejax.ops.sparse_matmul import sparse_matmul

name, implementation, batch, kind = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
mesh = Mesh(topology.devices(name)[:1], ("one",))

def array(*dims, dtype=kind):
    return aot.abstract(dims, dtype, mesh, PartitionSpec())

rows = {f"rows_{n}": array(64, 128, 2048) for n in ("gate", "up", "down")}
heads = array(128, 64, 2048)

def program(rows, heads, x, h, weight, chosen):
    q = sparse_matmul(x, heads, chosen, implementation=implementation)
    o = sparse_matmul(h, heads, chosen, implementation=implementation)
    return q, o, sparse_ffn(rows, x, chosen, jax.nn.silu, weight_BK=weight,
                            implementation=implementation)

compiled = aot.compile_for(program, rows, heads, array(batch, 2048), array(batch, 32, 64),
                           array(batch, 32), array(32, dtype=jnp.int32))
assert aot.memory(compiled).temp_bytes < 6 << 20, aot.memory(compiled)  # a copy: 17 MB
print("compiled")
"""


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "implementation", "batch", "dtype"),
    [
        ("v5e:2x2", "tpu", 1, "bfloat16"),
        ("v5p:2x2x1", "tpu", 1, "bfloat16"),
        ("h100x1", "gpu", 1, "bfloat16"),
        ("h100x1", "gpu", 8, "bfloat16"),
        ("h100x1", "gpu", 6, "float32"),
    ],
)
def test_the_kernels_compile_without_a_copy_of_the_blocks(name, implementation, batch, dtype):
    done = run_for(name, PROGRAM, name, implementation, str(batch), dtype)
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]
