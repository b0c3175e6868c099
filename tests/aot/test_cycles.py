"""The reader of cycles on a small text, and a kernel counted by the real compiler."""

import pytest

from moejax.aot import cycles
from tests.aot.test_topology import run_for

TEXT = """
ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %c = f32[8,128]{1,0} copy(%a), backend_config={"estimated_cycles":"700"}
  %k = f32[8] custom-call(%c), custom_call_target="tpu_custom_call", {"estimated_cycles":"52"}
  ROOT %n = f32[8,128]{1,0} negate(%k), backend_config={"estimated_cycles":"3"}
}
"""


class Compiled:
    def __init__(self, text):
        self.text = text

    def as_text(self):
        return self.text


def test_cycles_of_kernels_and_of_the_program():
    assert cycles.kernel_cycles(Compiled(TEXT)) == 52
    assert cycles.program_cycles(Compiled(TEXT)) == 755
    assert cycles.program_cycles(Compiled(TEXT), without=(" copy(",)) == 55


def test_a_program_that_was_not_counted_is_refused():
    plain = TEXT.replace("estimated", "guessed")
    for count in (cycles.kernel_cycles, cycles.program_cycles):
        with pytest.raises(ValueError, match=r"started with moejax\.aot\.cycles\.environment"):
            count(Compiled(plain))


MASKED = """
  %m = pred[8,64]{1,0} fusion(%a), backend_config={"estimated_cycles":"9","is_mask":true}
  ROOT %d = bf16[8,256,128] fusion(%x, %y, %m), backend_config={"window_config":{\
"kernel_window_bounds":["1","2","1"],"output_window_bounds":["1","16","1"],\
"estimated_cycles":"3200","iteration_bounds":["8","1","2","1","4"]},"mask_aggregator_config":{\
"mask_dim_to_iteration_index":["1","4"]},"bundle_analysis_data":{"estimated_cycles":"5000"}}
"""


def test_windows_of_a_masked_product():
    found = cycles.masked_product(Compiled(MASKED))
    assert found == cycles.Masked(3200, rows=16, windows=4)
    with pytest.raises(ValueError, match="has 0 masked products"):
        cycles.masked_product(Compiled(TEXT))


PROGRAM = """
import os, sys, tempfile
from moejax.aot import cycles
folder = tempfile.TemporaryDirectory()
os.environ |= cycles.environment(folder.name)
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec as P
from moejax.aot import compile as aot, topology

mesh = Mesh(topology.devices("v5p:2x2x1")[:1], ("one",))
x = aot.abstract((1024, 512), jnp.bfloat16, mesh, P())
w = aot.abstract((512, 512), jnp.bfloat16, mesh, P())

def kernel(x, w, out):
    out[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32).astype(out.dtype)

def program(x, w):
    row = pl.BlockSpec((256, 512), lambda i: (i, 0))
    whole = pl.BlockSpec((512, 512), lambda i: (0, 0))
    out = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
    return pl.pallas_call(kernel, grid=4, in_specs=[row, whole], out_specs=row, out_shape=out)(x, w)

print(cycles.kernel_cycles(aot.compile_for(program, x, w)))
"""


@pytest.mark.aot
def test_a_kernel_takes_at_least_what_its_products_take():
    done = run_for("v5p:2x2x1", PROGRAM)
    assert done.returncode == 0, done.stderr[-3000:]
    ideal = 2 * 1024 * 512 * 512 / 131_072  # one core: the grid has no parallel dimension
    assert ideal < int(done.stdout.split()[-1]) < 3 * ideal
