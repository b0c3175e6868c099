"""A model read onto a mesh of 8 devices: the same numbers, and no byte more than they need."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from moejax.core import tree
from moejax.io.load import load_any
from moejax.io.safetensors import SafetensorsFolder
from moejax.io.sharded import load_sharded
from tests.tiny_llama import fields_of, tensors_of, write_llama

folder = write_llama(Path(sys.argv[1]), fields_of("plain"), tensors_of(fields_of("plain")))
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
specs = {"w_q": P(None, "fsdp", "tensor"), "w_o": P(None, "tensor", None, "fsdp"),
         "w_up": P(None, "fsdp", "tensor"), "w_down": P(None, "tensor", "fsdp"),
         "w_k": P(None, None, None, "tensor")}
num_read = 0
plain = SafetensorsFolder.read
def counted(self, *args):
    global num_read
    value = plain(self, *args)
    num_read += value.nbytes
    return value
SafetensorsFolder.read = counted
found = load_sharded(
    load_any(folder, abstract=True),
    lambda path, leaf: NamedSharding(mesh, specs.get(path.split("/")[-1], P())),
)
# Split leaves are read once in all; w_k, cut within heads, once per half.
w_k = tree.flatten(found.params)["layers/0/attn/w_k"].nbytes
assert num_read == tree.num_bytes(found.params) + w_k, (num_read, tree.num_bytes(found.params))
expected = load_any(folder)
assert tree.diff(jax.tree.map(np.asarray, found.params), expected.params) == []
assert len(found.params["layers"]["0"]["attn"]["w_q"].sharding.device_set) == 8
print("equal")
"""


def test_devices_get_their_slices_and_nothing_else_is_read(tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "m")],
        cwd=Path(__file__).parents[2],
        env=os.environ | flags,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "equal"
