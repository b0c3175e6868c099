"""The training step of ESFT as a program on a mesh: what launch.compile plans for its configs."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from launch.esft_train import check_method, make_adaptation, make_loss, training_model
from launch.program import BATCH_DTYPES, grad_dtype, parallel_options
from launch.settings import train_config
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods import expert_config
from moejax.methods.adaptation import Adaptation
from moejax.methods.expert_config import ExpertConfig, moe_layers
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.train.optim import make_optimizer
from moejax.train.placement import StepProgram, step_program
from moejax.train.step import StepOptions

_SPREAD = "spread:"


def esft_program(config: ConfigDict, model: ModelConfig, mesh: Mesh) -> StepProgram:
    """As `launch.program.make_program`, with float32 masters and moments of chosen experts alone.

    method.experts is a file of --stage=select, or spread:N, N experts of each layer evenly spread.
    """
    check_method(config)
    model, settings = training_model(config, model), train_config(config, None)
    chosen = chosen_experts(config.method.experts, model)
    faces: list[Any] = []

    def parts(params):
        made = make_adaptation(config, params, model, chosen)
        faces[:] = [made.assemble, made.finish]
        return made.trainable, made.frozen

    both = jax.eval_shape(parts, transformer.abstract_params(model, config.model.dtype))
    shape = (config.train.batch_size, config.data.seq_len)
    options = StepOptions(
        settings.accumulation,
        settings.accumulation_dtype,
        settings.max_skipped > 0,
        mesh,
        grad_dtype=grad_dtype(config),
        overlap=settings.overlap,
    )
    return step_program(
        make_loss(config, model, Adaptation({}, {}, *faces), parallel_options(config, mesh)),
        make_optimizer(settings.optim, settings.steps),
        both,
        {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in BATCH_DTYPES.items()},
        options,
    )


def trained_share(config: ConfigDict, model: ModelConfig) -> float:
    """Trained parameters over those of the model."""
    chosen = None
    if config.method.name == "esft":
        chosen = chosen_experts(config.method.experts, model)

    def trained(params):
        return make_adaptation(config, params, model, chosen).trainable

    params = transformer.abstract_params(model)
    return tree.num_params(jax.eval_shape(trained, params)) / tree.num_params(params)


def chosen_experts(source: str, model: ModelConfig) -> ExpertConfig:
    """The experts that a plan trains. InputError for none, or more than a layer has."""
    if not source.startswith(_SPREAD):
        if not source:
            raise InputError("--config.method.experts is missing: a file, or spread:N to plan with")
        return expert_config.read(source)
    moe = model.moe
    routed, first = (0, 0) if moe is None else (moe.num_routed, moe.num_shared)
    number = source.removeprefix(_SPREAD)
    if not number.isdigit() or not 0 < int(number) <= routed:
        raise InputError(f"--config.method.experts={source}: N from 1 to {routed or 'no'} experts")
    # Shared ones come first, where they lie among the experts.
    ids = tuple(first + i * routed // int(number) for i in range(int(number)))
    return ExpertConfig(dict.fromkeys(moe_layers(model), ids))
