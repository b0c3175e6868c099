"""Run as a program with eight CPU devices: ESFT's loss and gradients on meshes, JSON out."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np

from moejax.core import tree
from moejax.core.mesh import make_mesh
from moejax.methods import esft
from moejax.methods.expert_config import ExpertConfig
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions
from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.moe.expert_parallel import Parallel
from moejax.train.loss import lm_loss
from moejax.train.optim import OptimConfig, make_optimizer
from moejax.train.placement import place_params
from moejax.train.state import init_state

MOE = MoEConfig(8, 2, **CONVENTIONS["olmoe"] | {"balance": "none"})
CONFIG = ModelConfig("olmoe", 64, 2, 16, 16, 2, 2, 8, moe=MOE, initializer_range=0.3)
XFT = dataclasses.replace(CONFIG, moe=MoEConfig(8, 3, noise=False, balance="none"))
CHOSEN = ExpertConfig({0: (5, 1, 7), 1: (2,)})
CASES = {
    "chunked_ep4_fsdp2": (CONFIG, CHOSEN, "chunked", {"fsdp": 2, "expert": 4}),
    "all_gather_ep2_data2_tensor2": (
        CONFIG, CHOSEN, "all_gather", {"data": 2, "expert": 2, "tensor": 2}
    ),
    "xft_shared_ep8": (
        XFT, dataclasses.replace(CHOSEN, shared_experts=True), "all_gather", {"expert": 8}
    ),
}


def run(config, chosen, strategy, sizes) -> dict[str, float]:
    params = transformer.init_params(config, jax.random.key(0))
    trainable, frozen = esft.split_params(params, config, chosen)
    shape = (8, 8)
    batch = {
        "tokens": np.random.default_rng(0).integers(0, 64, shape).astype(np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(8, dtype=np.int32), shape),
        "loss_mask": np.ones(shape, np.float32),
    }

    def loss(trainable, frozen, options):
        return lm_loss(esft.assemble(trainable, frozen), config, batch, None, options)[0]

    value, grads = jax.jit(jax.value_and_grad(lambda t, f: loss(t, f, ForwardOptions())))(
        trainable, frozen
    )
    mesh = make_mesh(**sizes)
    options = ForwardOptions(parallel=Parallel(mesh, strategy))
    places = [
        jax.tree.map(lambda leaf: leaf.sharding, place_params(tree.abstract(part), mesh))
        for part in (trainable, frozen)
    ]
    parts = [jax.device_put(p, place) for p, place in zip((trainable, frozen), places, strict=True)]
    ours = jax.jit(
        jax.value_and_grad(lambda t, f: loss(t, f, options)), out_shardings=(None, places[0])
    )(*parts)
    state = init_state(parts[0], make_optimizer(OptimConfig("adamw", 1e-3), 1))
    held = [sum(s.data.nbytes for leaf in jax.tree.leaves(state.params)
                for s in leaf.addressable_shards if s.device == device)
            for device in jax.devices()]
    errors = [
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())
        for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(grads), strict=True)
    ]
    return {
        "loss": abs(float(ours[0] - value)),
        "grads": max(errors),
        "uneven": max(held) / min(held) - 1,
    }


if __name__ == "__main__":
    print(json.dumps({name: run(*case) for name, case in CASES.items()}))
