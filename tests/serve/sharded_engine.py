"""Run as a program with 8 CPU devices: an engine on a mesh and on one device, JSON out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax

import moejax as mj
from moejax.core.mesh import make_mesh
from moejax.serve.engine import Engine
from moejax.serve.request import EngineConfig, Request
from moejax.serve.sampling import SamplingConfig
from tests.io.sharded_cases import write

NAME = "qwen2_moe-dense_first_windows_sum_to_one"


def answers(model) -> tuple[Engine, list]:
    settings = EngineConfig(
        num_slots=2, max_length=32, page_size=8, prefill_chunk=8, num_steps=4, max_logprobs=0
    )
    engine = Engine(model.params, model.config, settings)
    hot = SamplingConfig(1.0, top_k=20)
    requests = [Request((3, 5, 7) * n, 6, hot, n, num_logprobs=0) for n in (1, 4, 2)]
    found = engine.run(requests)
    return engine, [[a.ids, [p.log_prob for p in a.logprobs]] for (a,) in found]


def main(folder: Path) -> None:
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    path = write(NAME, folder / NAME)
    engine, sharded = answers(mj.load(path, mesh=mesh))
    pages = jax.tree.leaves(engine._pool)[0]
    results = {
        "sharded": sharded,
        "one": answers(mj.load(path))[1],
        "parts_of_heads": pages.shape[1] // pages.sharding.shard_shape(pages.shape)[1],
        "devices": len(pages.sharding.device_set),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
