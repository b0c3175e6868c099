"""The middle of the experts' backward pass: by automatic differentiation, and as one TPU kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from moejax.ops.gated_backward import gated_backward
from moejax.ops.tpu_gated import gated_backward_tpu, takes
from tests.aot.test_topology import run_for
from tests.draws import normal

# A piece of columns and what is left of one, in whole lanes or not; a block of rows and a part.
SHAPES = [(160, 640), (48, 40), (272, 688)]


def operands(rows: int, columns: int, dtype: str = "float32"):
    arrays = [normal((rows, columns), seed).astype(dtype) for seed in range(3)]
    return *arrays, jnp.abs(normal((rows,), 3))


@pytest.mark.parametrize("activation", [jax.nn.silu, jax.nn.gelu, jax.nn.relu])
def test_equals_the_gradient_of_the_weighted_layer(activation):
    gate, up, d_hidden, weights = operands(12, 20)

    def layer(gate, up, weights):  # d_hidden as dL/d(w_r hidden_r)
        return jnp.sum(weights[:, None] * activation(gate) * up * d_hidden)

    d_gate, d_up, d_weights = jax.grad(layer, (0, 1, 2))(gate, up, weights)
    found = gated_backward(gate, up, d_hidden, weights, activation)
    wanted = (d_gate, d_up, weights[:, None] * activation(gate) * up, d_weights)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_equals_it_without_a_race(shape, dtype):
    arrays = operands(*shape, dtype)
    assert takes(arrays[0])
    how = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    found = gated_backward_tpu(*arrays, jax.nn.silu, how)
    assert not interpreter.races.races_found
    exact = gated_backward(*(a.astype(jnp.float32) for a in arrays), jax.nn.silu)
    assert [a.dtype for a in found] == [dtype] * 3 + [jnp.float32]
    rounded = 1e-6 if dtype == "float32" else 2**-8
    for one, other, error in zip(found, exact, [rounded] * 3 + [1e-5], strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=error, atol=1e-4)


def test_rows_that_are_no_whole_tiles_take_xla_s_programs():
    sizes = [(16, 100), (40, 128), (0, 128), (16, 1 << 20)]
    made = [takes(jax.ShapeDtypeStruct(shape, jnp.bfloat16)) for shape in sizes]
    assert made == [True, False, False, False]
    assert not takes(jax.ShapeDtypeStruct((16, 128), jnp.float16))


_COMPILE = """
import jax, jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
from moejax.aot import compile as aot, topology
from moejax.ops.gated_backward import gated_backward

mesh = Mesh(topology.devices("v5e:2x2")[:1], ("one",))
for dtype, shape in [("bfloat16", (3200, 5504)), ("bfloat16", (80, 688)),
                     ("float32", (160, 40))]:
    wide, one = (aot.abstract(s, d, mesh, P()) for s, d in
                 [(shape, dtype), (shape[:1], jnp.float32)])
    def step(gate, up, d_hidden, weights):
        how = {"implementation": "tpu"}
        return gated_backward(gate, up, d_hidden, weights, jax.nn.silu, **how)
    text = aot.compile_for(step, wide, wide, wide, one).as_text()
    print(text.count('"tpu_custom_call"'))
"""


@pytest.mark.aot
def test_compiles():
    done = run_for("v5e:2x2", _COMPILE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["1", "1", "1"]
