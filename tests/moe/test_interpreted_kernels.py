"""The layer with the kernels of TPUs and GPUs inside, interpreted: equal to its definition."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from moejax.core.mesh import make_mesh
from moejax.core.platform import compiling_for
from moejax.core.precision import TOLERANCE
from moejax.moe import expert_parallel
from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.moe.dense import dense_moe
from moejax.moe.expert_parallel import Parallel
from moejax.moe.layer import moe_layer
from moejax.moe.shapes import init_moe
from moejax.ops import grouped_matmul, grouped_matmul_gpu, grouped_matmul_tpu, tpu_gated
from tests.draws import normal

D, F = 24, 40  # no multiples of a tile
ROUTERS = {
    "mixtral": MoEConfig(8, 2, **CONVENTIONS["mixtral"]),
    "deepseek_v3": MoEConfig(8, 3, **CONVENTIONS["deepseek_v3"], shared_ffn=16),
    "expert_choice": MoEConfig(8, 2, **CONVENTIONS["expert_choice"]),
    "xft": MoEConfig(8, 3, noise=False),
}


def interpret(monkeypatch, implementation: str) -> None:
    """Lets the kernel of that name run in its interpreter, wherever the layer calls it."""
    if implementation == "gpu":
        kernel = functools.partial(_called, grouped_matmul_gpu.grouped_matmul_gpu, how=True)
        monkeypatch.setattr(grouped_matmul_gpu, "grouped_matmul_gpu", kernel)
        return
    how = pltpu.InterpretParams()
    names = ["grouped_matmul_tpu", "grouped_gated_tpu", "grouped_outer_tpu", "prepared_tpu"]
    where = dict.fromkeys([*names, "gated_products_tpu"], grouped_matmul_tpu)
    for name, module in {**where, "gated_backward_tpu": tpu_gated}.items():
        monkeypatch.setattr(
            module, name, functools.partial(_called, getattr(module, name), how=how)
        )


def _called(kernel, *arguments, how):
    asked = any(each is how for each in arguments)  # a kernel's gradient calls the kernel itself
    return kernel(*arguments, *([] if asked else [how]))


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("strategy", [None, "chunked", "chunked, kept"])
@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_layer_equals_its_definition(monkeypatch, implementation, strategy, router):
    config, parallel = ROUTERS[router], None
    if strategy:
        mesh = make_mesh(data=len(jax.devices()))
        parallel = Parallel(mesh, "chunked", keep=strategy == "chunked, kept")
        monkeypatch.setattr(expert_parallel, "worth_keeping", lambda *_: True)
    params = init_moe(jax.random.key(0), D, F, config)
    x_BTD, mixer_BTD = normal((len(jax.devices()), 20, D), 1), normal((1, 20, D), 2)

    def gradient(layer):
        def loss(params, x_BTD):
            y_BTD = layer(params, x_BTD)
            return jnp.sum(y_BTD * mixer_BTD), y_BTD

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x_BTD)

    wanted = gradient(lambda params, x_BTD: dense_moe(params, x_BTD, config))
    interpret(monkeypatch, implementation)
    how = {"implementation": implementation, "parallel": parallel}
    with compiling_for(implementation, "TPU v5"):
        assert implementation in grouped_matmul.PLATFORM
        got = gradient(lambda params, x_BTD: moe_layer(params, x_BTD, config, **how)[0])
    for ours, oracle in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        bound = TOLERANCE["float32"] * max(1e-6, np.abs(oracle).max())
        np.testing.assert_allclose(ours, oracle, rtol=0, atol=bound)
