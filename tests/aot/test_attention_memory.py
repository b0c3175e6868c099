"""Attention's memory on a TPU that is not here: linear in the text, forward and backward."""

import pytest

from tests.aot.test_topology import run_for

PROGRAM = """
import sys
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from moejax.aot import compile, topology
from moejax.ops.attention import AttentionSpec, Visible, attention

way = sys.argv[1]
mesh = Mesh(topology.devices("v5p:2x2x1")[:1], "data")

def temp_mib(num_tokens):
    def loss(q, k, v):
        spec = AttentionSpec(implementation=way)
        return attention(q, k, v, Visible(), 0, spec).astype(jnp.float32).sum()

    shapes = ((1, num_tokens, 16, 128), (1, 8, num_tokens, 128), (1, 8, num_tokens, 128))
    arguments = (compile.abstract(shape, jnp.bfloat16, mesh, P()) for shape in shapes)
    compiled = compile.compile_for(jax.grad(loss, argnums=(0, 1, 2)), *arguments)
    return compile.memory(compiled).temp_bytes / 2**20

print(*(f"{temp_mib(num_tokens):.0f}" for num_tokens in (8192, 32768)))
"""


@pytest.mark.aot
@pytest.mark.parametrize("way", ["blockwise", "splash"])
def test_temporary_memory_at_8k_and_32k_tokens(way):
    """A row of 16 heads, 8 groups, C = 128 in bfloat16, whose scores alone would take 64 GiB.

    577 and 402 MiB were measured at 32K, 98 and 66 at 8K.
    """
    done = run_for("v5p:2x2x1", PROGRAM, way)
    assert done.returncode == 0, done.stderr[-3000:]
    short, long = map(float, done.stdout.split())
    assert long < 7 * short < 700
