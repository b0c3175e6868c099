"""ESFT and full fine-tuning of DeepSeek-V2-Lite, planned for a pod slice that is not here.

    python -m tests.methods.measure_esft_pod EXPERTS.json

The state per device, from shapes and shardings alone: AdamW, bfloat16 with float32 masters, experts
over all devices. EXPERTS.json: a config of --stage=select, as the published. What a step takes
beside it: launch.compile with configs/esft/deepseek_v2_lite.py.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp

from moejax.aot import topology
from moejax.aot.estimate import shard_bytes
from moejax.core.mesh import make_mesh
from moejax.methods import expert_config
from moejax.methods.adaptation import adapt
from moejax.models import transformer
from moejax.models.families import by_name
from moejax.models.transformer import ForwardOptions
from moejax.moe.expert_parallel import Parallel
from moejax.train.loss import lm_loss
from moejax.train.optim import OptimConfig, make_optimizer
from moejax.train.placement import step_program
from moejax.train.step import StepOptions

MODEL = by_name("deepseek_v2").presets["deepseek-v2-lite"]
NAMES = {"tokens": "int32", "segment_ids": "int32", "positions": "int32", "loss_mask": "float32"}


def program_of(method: str, chosen, mesh):
    """The arm's training step on a mesh, from shapes alone."""
    faces = []

    def parts(params):
        made = adapt(method, params, MODEL, chosen=chosen)
        faces.append(made.assemble)
        return made.trainable, made.frozen

    base = transformer.abstract_params(MODEL, "bfloat16")
    both = jax.eval_shape(parts, base)
    options = ForwardOptions("bfloat16", "full", "tpu", parallel=Parallel(mesh, "all_gather"))

    def loss(trainable, frozen, batch, rng):
        return lm_loss(faces[0](trainable, frozen), MODEL, batch, None, options)

    shape = (mesh.size, 4096)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(kind)) for name, kind in NAMES.items()}
    optimizer = make_optimizer(OptimConfig("adamw", 1e-5, "constant", 0, 1.0, 0.1), 100)
    return step_program(loss, optimizer, both, batch, StepOptions(mesh=mesh))


def state(chosen) -> None:
    for name, number in (("v5p:2x2x2", 8), ("v5e:4x4", 16)):
        mesh = make_mesh(expert=number, devices=topology.devices(name))
        found = {}
        for method in ("full", "esft"):
            program = program_of(method, chosen, mesh)
            found[method] = shard_bytes(program.state) + shard_bytes(program.frozen)
            print(f"{name} {method}: {found[method] / 1e9:.2f} GB of state per device", flush=True)
        print(f"{name} ratio {found['esft'] / found['full']:.3f}", flush=True)


if __name__ == "__main__":
    state(expert_config.read(sys.argv[1]))
