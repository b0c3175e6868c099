"""From a config and a mesh to the training step as a program: what train runs and compile plans."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from launch.settings import forward_options, plan_memory, split_frozen, train_config
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.memory import GIB, available_bytes
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.moe.expert_parallel import Parallel
from moejax.train.layout import choose_mesh
from moejax.train.loop import TrainConfig
from moejax.train.loss import lm_loss
from moejax.train.optim import make_optimizer
from moejax.train.placement import StepProgram, step_program
from moejax.train.selection_bias import selection_bias_update
from moejax.train.step import LossFn, StepOptions

BATCH_DTYPES = {"tokens": "int32", "segment_ids": "int32", "positions": "int32"} | {
    "loss_mask": "float32"
}


def make_mesh_of(
    config: ConfigDict, model: ModelConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of --config.mesh.* (0 chooses a size) over all devices, or over those given."""
    train, sizes = config.train, config.mesh.to_dict()
    if sizes.pop("sequence") > 1:
        raise InputError(_how_far(config, model))
    return choose_mesh(sizes, model, train.batch_size, train.accumulation, devices)


def _how_far(config: ConfigDict, model: ModelConfig) -> str:
    """Why a row is not split along its length, and how long one may be on one device here."""
    length = max(512, config.data.seq_len)  # from 512 tokens on attention's memory is linear
    one = copy.deepcopy(config)
    one.data.seq_len, one.train.batch_size, one.train.accumulation = length, 1, 1
    memory = plan_memory(one, model, train_config(one, 1), make_loss(model, one))
    stats = jax.local_devices()[0].memory_stats() or {}
    there = stats.get("bytes_limit", available_bytes())
    at_rest, per_token = memory.total - memory.activations, memory.activations / length
    reach = int(max(0, there - at_rest) / per_token)
    further = ["compute.remat=full"] * (config.compute.remat not in ("full", "offload"))
    further += ["compute.remat=offload"] * (config.compute.remat != "offload")
    further += ["compute.dtype=bfloat16"] * (config.compute.dtype == "float32")
    return (
        f"mesh.sequence={config.mesh.sequence}: rows are not split along their length (there is no "
        f"sequence parallelism). One device here, {there / GIB:.1f} GiB, reaches rows of at least "
        f"{reach:,} tokens for this model with remat {config.compute.remat}: "
        f"{at_rest / GIB:.1f} GiB of state and {per_token / 1024:.0f} KiB of activations a token. "
        f"{', '.join(further)} or more devices on mesh.fsdp and mesh.tensor reach further; "
        "set mesh.sequence to 1"
    )


def make_program(
    config: ConfigDict,
    model: ModelConfig,
    mesh: Mesh,
    settings: TrainConfig | None = None,
) -> StepProgram:
    """The jitted training step of a config on a mesh, with abstract state, batch and shardings.

    Nothing is read and no array is made. To compile it for a topology whose devices are not here:

        devices = moejax.aot.topology.devices("v5p:2x2x2")
        program = make_program(config, model, make_mesh_of(config, model, devices))
        compiled = program.lower().compile()

    `settings` (default `train_config(config, None)`) holds the steps, which an epoch count alone
    does not give. Errors: InputError where the model or the batch does not divide by the mesh.
    """
    settings = train_config(config, None) if settings is None else settings
    params = transformer.abstract_params(model, config.model.dtype)
    shape = (config.train.batch_size, config.data.seq_len)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in BATCH_DTYPES.items()}
    return step_program(
        make_loss(model, config, mesh),
        make_optimizer(settings.optim, settings.steps),
        split_frozen(config, params),
        batch,
        StepOptions(
            settings.accumulation,
            settings.accumulation_dtype,
            settings.max_skipped > 0,
            mesh,
            grad_dtype=grad_dtype(config),
            overlap=settings.overlap,
        ),
        selection_bias_update(model),
    )


def grad_dtype(config: ConfigDict) -> str | None:
    """Gradients of blocks are no wider than the arithmetic that they come from."""
    at_rest, arithmetic = jnp.dtype(config.model.dtype), jnp.dtype(config.compute.dtype)
    return config.compute.dtype if arithmetic.itemsize < at_rest.itemsize else None


def make_loss(model: ModelConfig, config: ConfigDict, mesh: Mesh | None = None) -> LossFn:
    """The loss of all parameters, with the routers' noise."""
    options = parallel_options(config, mesh)
    memory, z_weight = config.compute.max_logit_mib * 2**20, config.train.z_loss

    def loss(params, frozen, batch, rng):
        both = tree.join(params, frozen)
        return lm_loss(both, model, batch, rng, options, memory, z_weight)

    return loss


def parallel_options(config: ConfigDict, mesh: Mesh | None) -> transformer.ForwardOptions:
    """How to compute, on a mesh of several devices or on one."""
    options = forward_options(config)
    if mesh is None or mesh.size == 1:
        return options
    strategy = config.compute.moe_strategy
    return dataclasses.replace(options, parallel=Parallel(mesh, strategy))
