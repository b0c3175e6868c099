"""Run as a program: a few training steps, sharded and not, JSON out.

sharded_cases.py quick|all        8 devices, one process: cases against one device
sharded_cases.py INDEX PORT       one of two processes with 4 devices each: losses of TWO
"""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import numpy as np

from moejax.core import tree
from moejax.core.mesh import make_mesh
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions
from moejax.moe.config import MoEConfig
from moejax.moe.expert_parallel import Parallel
from moejax.train.loss import lm_loss
from moejax.train.optim import OptimConfig, make_optimizer
from moejax.train.placement import global_batch, step_program
from moejax.train.state import init_state
from moejax.train.step import StepOptions, make_train_step

DENSE = ModelConfig("llama", 96, 2, 16, 24, 4, 4, 4, max_position=64)
MOE = dataclasses.replace(DENSE, moe=MoEConfig(8, 2, noise=False, balance_scope="global"))
UNTIED = dataclasses.replace(DENSE, tie_embeddings=False)
ROWS, LENGTH, STEPS = 16, 12, 3
# (name, model, (data, fsdp, expert, tensor), strategy, optimizer, accumulation, remat)
CASES = (
    ("dense fsdp", UNTIED, (1, 8, 1, 1), "auto", "adamw", 1, "none"),
    ("dense mixed, accumulated", DENSE, (2, 2, 1, 2), "auto", "adafactor", 2, "full"),
    ("moe chunked", MOE, (1, 2, 2, 2), "chunked", "adamw", 2, "none"),
    ("moe all_gather", MOE, (1, 1, 8, 1), "all_gather", "adafactor", 1, "dots"),
    ("moe local", MOE, (2, 2, 1, 2), "local", "adamw", 1, "none"),
    ("moe capacity", MOE, (1, 2, 4, 1), "capacity", "adamw", 1, "none"),
    ("moe ragged", MOE, (1, 2, 4, 1), "ragged", "muon", 2, "full"),
)
QUICK = TWO = (CASES[1], CASES[2])


def batch_of(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    shape = (ROWS, LENGTH)
    segments = np.repeat([[1] * 5 + [2] * 5 + [0] * 2], ROWS, axis=0).astype(np.int32)
    positions = np.repeat([[*range(5), *range(5), 0, 0]], ROWS, axis=0).astype(np.int32)
    return {
        "tokens": rng.integers(0, 96, shape).astype(np.int32),
        "segment_ids": segments,
        "positions": positions,
        "loss_mask": (rng.random(shape) < 0.7).astype(np.float32),
    }


def job(case):
    """Loss function maker, optimizer and start values of a case."""
    _, model, _, _, name, _, remat = case

    def loss_of(parallel):
        options = ForwardOptions(remat=remat, parallel=parallel)

        def loss(params, frozen, batch, rng):
            return lm_loss(tree.join(params, frozen), model, batch, rng, options)

        return loss

    # AdamW's first steps are signs of the gradient, which rounding flips where it is near 0.
    optimizer = make_optimizer(OptimConfig(name, lr=0.02, clip_norm=1.0, eps=1e-3), STEPS)
    return loss_of, optimizer, transformer.init_params(model, jax.random.key(0))


def run_plain(case) -> tuple[list[float], tree.Tree]:
    loss_of, optimizer, params = job(case)
    step = make_train_step(loss_of(None), optimizer, StepOptions(case[5]))
    state, losses = init_state(params, optimizer), []
    for index in range(STEPS):
        state, metrics = step(state, {}, batch_of(index), jax.random.key(1))
        losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, state.params)


def run_sharded(case) -> tuple[list[float], tree.Tree]:
    """Losses and parameters; of every leaf this process's part must lie as it should."""
    loss_of, optimizer, params = job(case)
    mesh = make_mesh(*case[2])
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch_of(0).items()}
    program = step_program(
        loss_of(Parallel(mesh, case[3], factor=8.0)),
        optimizer,
        (params, {}),
        batch,
        StepOptions(case[5], mesh=mesh),
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    state = jax.jit(lambda p: init_state(p, optimizer), out_shardings=places)(params)
    losses = []
    for index in range(STEPS):
        whole = batch_of(index)
        rows = global_batch(mesh, lambda a, b, w=whole: {k: v[a:b] for k, v in w.items()}, ROWS)
        state, metrics = program.step(state, {}, rows, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(program.state), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), (leaf.sharding, wanted)
    return losses, state.params


def relative(found, wanted) -> float:
    found, wanted = np.asarray(found), np.asarray(wanted)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def one_process(cases) -> None:
    for case in cases:
        (losses, params), (found, sharded) = run_plain(case), run_sharded(case)
        worst = jax.tree.map(relative, sharded, params)
        about = {"name": case[0], "losses": relative(found, losses)}
        print(json.dumps(about | {"params": max(jax.tree.leaves(worst))}), flush=True)


def two_processes(index: int, port: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    for case in TWO:
        losses, _ = run_plain(case) if index == 0 else ([], None)
        found, _ = run_sharded(case)
        about = {"name": case[0], "found": found}
        print(json.dumps(about | ({"wanted": losses} if losses else {})), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        two_processes(int(sys.argv[1]), sys.argv[2])
    else:
        one_process(QUICK if sys.argv[1] == "quick" else CASES)
