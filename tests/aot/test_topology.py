"""Names of topologies, what is said when their compilers are missing, and programs compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moejax.aot import topology

ROOT = Path(__file__).resolve().parents[2]
# One matmul by a sharded matrix: the contraction is split, so its sum crosses the devices.
PROGRAM = """
import sys
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from moejax.aot import compile, hlo, topology

name, num_devices = sys.argv[1], int(sys.argv[2])
mesh = topology.mesh(name, {"fsdp": 2, "expert": num_devices // 2})
x = compile.abstract((256, 2048), jnp.bfloat16, mesh, P(None, ("fsdp", "expert")))
w = compile.abstract((2048, 512), jnp.bfloat16, mesh, P(("fsdp", "expert"), None))
compiled = compile.compile_for(lambda x, w: jnp.sum(x @ w, dtype=jnp.float32), x, w)
memory = compile.memory(compiled)
assert memory.argument_bytes == (256 + 512) * 2048 * 2 // num_devices, memory
assert 0 < memory.output_bytes <= 4096, memory
assert memory.total_bytes >= memory.argument_bytes + memory.output_bytes, memory
found = hlo.collectives(compiled.as_text())
assert {c.kind for c in found} == {"all-reduce"}, found
assert max(c.bytes for c in found) in (4, 256 * 512 * 2, 256 * 512 * 4), found
flops = compile.flops(compiled)
ideal = 2 * 256 * 2048 * 512 / num_devices
assert flops is None if name.startswith("h100") else ideal <= flops < 1.5 * ideal, flops
print("compiled")
"""


def run_for(name, program, *arguments):
    """A process of its own that may compile for the topology `name`."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **topology.environment(name)},
        capture_output=True,
        text=True,
        timeout=1200,  # of which a busy machine may take most
        check=False,
    )


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "num_devices"), [("v5e:2x2", 4), ("v5p:2x2x2", 8), ("v6e:2x2", 4), ("h100x8", 8)]
)
def test_a_program_compiles_and_its_memory_and_collectives_are_read(name, num_devices):
    done = run_for(name, PROGRAM, name, str(num_devices))
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]


@pytest.mark.aot
def test_a_mesh_of_the_wrong_size_names_both_numbers():
    program = "from moejax.aot import topology; topology.mesh('h100x8', {'expert': 6})"
    done = run_for("h100x8", program)
    assert "takes 6 devices and h100x8 has 8" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "name", ["v5p:2x2", "v5e:2x2x2", "v4:2x2x1", "v5e", "h100", "h100x9", "h100x0", "v5e:2x", ""]
)
def test_a_name_that_is_no_topology(name):
    with pytest.raises(ValueError, match="is no topology: give v5e:AxB"):
        topology.devices(name)


@pytest.mark.parametrize(("name", "module"), [("v5e:2x2", "libtpu"), ("h100x2", "jax_plugins")])
def test_a_missing_compiler_is_one_line_with_the_command(name, module, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    for use in (topology.environment, topology.devices):
        with pytest.raises(ValueError) as caught:
            use(name)
        said = str(caught.value)
        assert module in said and "pip install -e .[aot]" in said and "\n" not in said


def test_the_environment_keeps_libtpu_off_the_network(monkeypatch):
    monkeypatch.setattr(topology, "missing", lambda name: None)
    environment = topology.environment("v6e:2x2")
    assert environment["TPU_SKIP_MDS_QUERY"] == "1" and environment["JAX_PLATFORMS"] == "cpu"
    assert environment["TPU_ACCELERATOR_TYPE"] == "v6e-4"
