"""Every way in which tokens travel compiles for accelerators, forward and backward."""

import pytest

from tests.aot.test_topology import run_for

PROGRAM = """
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moejax import moe
from moejax.aot import compile, topology
from moejax.core import tree
from moejax.moe.expert_parallel import STRATEGIES, Parallel

name, implementation = sys.argv[1:]
axes = {"data": 1, "fsdp": 1, "expert": 8, "tensor": 1}
mesh = topology.mesh(name, axes)
config = moe.MoEConfig(16, 2, **moe.CONVENTIONS["mixtral"])
shapes = jax.eval_shape(lambda key: moe.init_moe(key, 256, 256, config), jax.random.key(0))
place = lambda path: P("expert") if path.startswith("experts/") else P()
params = tree.map_with_path(
    lambda path, leaf: compile.abstract(leaf.shape, jnp.bfloat16, mesh, place(path)), shapes
)
x = compile.abstract((8, 256, 256), jnp.bfloat16, mesh, P(("data", "fsdp", "expert")))
for strategy in sorted(set(STRATEGIES) - {"local"}):
    def loss(params, x):
        parallel = Parallel(mesh, strategy)
        y, stats = moe.moe_layer(
            params, x, config, parallel=parallel, implementation=implementation
        )
        return jnp.sum(y.astype(jnp.float32)) + stats.balance_loss

    compiled = compile.compile_for(jax.grad(loss, (0, 1)), params, x)
    text = compiled.as_text()
    print(strategy, "ragged-all-to-all" in text, "all-to-all" in text)
"""


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize(("name", "kernels"), [("v5e:2x4", "tpu"), ("h100x8", "gpu")])
def test_every_strategy_compiles_with_our_kernels(name, kernels):
    done = run_for(name, PROGRAM, name, kernels)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert set(found) == {"all_gather", "capacity", "chunked", "ragged"}
    assert found["ragged"][0] == "True" and found["chunked"][1] == "True"
