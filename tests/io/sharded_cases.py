"""Run as a program with 8 CPU devices: models read onto a mesh, JSON out.

With three arguments (folder, process id, port) it is one of two processes with 4 devices each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import moejax as mj
from moejax.core import tree
from moejax.core.mesh import make_mesh
from moejax.core.sharding import param_spec
from moejax.io.load import load_any
from moejax.io.safetensors import SafetensorsFolder
from tests.parity.cases import TOKENS, fields_of
from tests.tiny_llama import tensors_of, write_llama

CASES = (
    "llama-llama3_biases_odd_head",
    "gemma2-grouped_tied",
    "opt-after_projected",
    "qwen2_moe-dense_first_windows_sum_to_one",
    "deepseek_v2-q_rank_groups_scaled_biases",
)
WITH_LOGITS = (CASES[0], CASES[3])
# Sizes that 4 and 8 devices divide, where a case has others.
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
SIZES |= {"shared_expert_intermediate_size": 24, "q_lora_rank": 12, "kv_lora_rank": 8}
SIZES |= {"word_embed_proj_dim": 24}


def write(name: str, folder: Path) -> Path:
    fields = fields_of(name)
    fields |= {key: value for key, value in SIZES.items() if key in fields}
    return write_llama(folder, fields, tensors_of(fields))


def count_reads() -> list[int]:
    """From now on the list holds the bytes of every tensor part read."""
    found: list[int] = []
    plain = SafetensorsFolder.read

    def counted(self, *args):
        value = plain(self, *args)
        found.append(value.nbytes)
        return value

    SafetensorsFolder.read = counted
    return found


def needed(params) -> int:
    """Bytes of the slices that this process's devices hold, each once; biases of heads are read
    whole for each slice of them."""
    total = 0
    for path, leaf in tree.flatten(params).items():
        parts = {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}
        whole = path.rsplit("/", 1)[1] in ("b_q", "b_k", "b_v")
        total += len(parts) * leaf.nbytes if whole else sum(parts.values())
    return total


def check(model: mj.Model, plain, mesh) -> None:
    """Every leaf lies as the rules say and holds the values of the plain one."""
    leaves = tree.flatten(plain.params)
    assert leaves.keys() == tree.flatten(model.params).keys()
    for path, leaf in tree.flatten(model.params).items():
        wanted = NamedSharding(mesh, param_spec(path, leaf.shape, mesh))
        assert leaf.sharding == wanted and leaf.dtype == leaves[path].dtype, path
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == leaves[path][shard.index].tobytes(), path


def one_process(folder: Path) -> None:
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    for name in CASES:
        path = write(name, folder / name)
        plain = load_any(path)
        reads = count_reads()
        model = mj.load(path, mesh=mesh)
        about = {"name": name, "read": sum(reads), "needed": needed(model.params)}
        check(model, plain, mesh)
        if name in WITH_LOGITS:
            wanted = np.asarray(mj.load(path).logits(TOKENS))
            found = np.asarray(model.logits(TOKENS))
            about["logits"] = float(np.abs(found - wanted).max() / np.abs(wanted).max())
        print(json.dumps(about))
    model.save(folder / "native", format="orbax")
    half = mj.load(folder / "native", "bfloat16", mesh=mesh)
    check(half, load_any(folder / "native", "bfloat16"), mesh)
    own = mj.load(path, sharding=lambda path, leaf: NamedSharding(mesh, PartitionSpec()))
    assert tree.diff(own.params, plain.params) == []
    print(json.dumps({"name": "native"}))


def two_processes(folder: Path, index: int, port: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)  # a process is one half of fsdp
    reads = count_reads()
    model = mj.load(folder, mesh=mesh)
    num_read = sum(reads)
    plain = load_any(folder)
    check(model, plain, mesh)
    assert model.lineage[0]["inputs"][0]["xxh3"] == ""
    about = {"read": num_read, "needed": needed(model.params), "all": tree.num_bytes(plain.params)}
    print(json.dumps({"name": f"process {index}"} | about))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        two_processes(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    else:
        one_process(Path(sys.argv[1]))
