"""Run as a program with eight CPU devices: models on a mesh against one device, JSON out."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moejax.core import tree
from moejax.core.mesh import TOKEN_AXES, make_mesh
from moejax.core.sharding import param_spec
from moejax.methods.upcycle import upcycle
from moejax.models import transformer
from moejax.models.cache import init_cache
from moejax.models.config import ModelConfig
from moejax.models.mla import MLAConfig
from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.moe.expert_parallel import Parallel
from moejax.train.loss import lm_loss
from tests.moe.expert_parallel_cases import relative

DENSE = ModelConfig("llama", 64, 2, 16, 24, 4, 2, 6, initializer_range=0.3)
MIXTRAL = MoEConfig(8, 2, **{**CONVENTIONS["mixtral"], "balance": "pooled"})
DEEPSEEK = MoEConfig(
    8, 3, **CONVENTIONS["deepseek_v2"], num_groups=4, top_groups=2, expert_ffn=12, shared_ffn=16
)
CONFIGS = {
    "upcycled": DENSE,  # see `parameters`
    "mixtral": dataclasses.replace(DENSE, moe=MIXTRAL, mlp_bias=True),
    "deepseek": dataclasses.replace(
        DENSE,
        num_layers=3,
        num_kv_heads=4,
        head_size=10,
        moe=DEEPSEEK,
        num_dense_layers=1,
        mla=MLAConfig(8, None, 6, 4, 5),
    ),
}
# name, mesh (data, fsdp, expert, tensor), strategy, remat
CASES = (
    ("upcycled", (1, 2, 2, 2), "chunked", "full"),
    ("mixtral", (1, 4, 1, 2), "local", "none"),
    ("deepseek", (2, 1, 4, 1), "chunked", "dots"),
)
BATCH, T = 8, 12


def parameters(name: str):
    config = CONFIGS[name]
    params = transformer.init_params(config, jax.random.key(0))
    if name == "upcycled":
        moe = MoEConfig(4, 3, noise=False, balance_scope="global")
        params, config = upcycle(params, config, moe, jax.random.key(1))
    draw = np.random.default_rng(0)
    # Biases start at zero: moved, or they would test nothing. Routers start small: the same.
    moved = tree.map_with_path(
        lambda path, w: w + 0.3 * jnp.asarray(draw.normal(size=w.shape), w.dtype), params
    )
    return moved, config


def batch() -> dict[str, jax.Array]:
    draw = np.random.default_rng(1)
    segments = np.ones((BATCH, T), np.int32)
    segments[:, 5:] = 2  # two texts to a row, the last three rows end in padding
    segments[-3:, 9:] = 0
    positions = np.concatenate([np.arange(5), np.arange(T - 5)])
    return {
        "tokens": jnp.asarray(draw.integers(0, 64, (BATCH, T)), jnp.int32),
        "segment_ids": jnp.asarray(segments),
        "positions": jnp.asarray(np.broadcast_to(positions, (BATCH, T)), jnp.int32),
        "loss_mask": jnp.asarray(draw.random((BATCH, T)) < 0.7),
    }


def case(name: str, sizes: tuple[int, ...], strategy: str, remat: str) -> dict[str, float]:
    mesh = make_mesh(*sizes)
    params, config = parameters(name)
    specs = tree.map_with_path(lambda path, w: param_spec(path, w.shape, mesh), params)
    put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
    rows = PartitionSpec(TOKEN_AXES)
    plain = transformer.ForwardOptions(remat=remat)
    on_mesh = dataclasses.replace(plain, parallel=Parallel(mesh, strategy))

    def grad(params, batch, options):
        run = lambda params: lm_loss(params, config, batch, options=options)  # noqa: E731
        return jax.value_and_grad(run, has_aux=True)(params)

    both = jax.jit(grad, static_argnums=2)
    want = both(params, batch(), plain)
    placed = jax.tree.map(put, params, specs)
    spread = {key: put(a, rows) for key, a in batch().items()}
    got = both(placed, spread, on_mesh)
    found = {"loss": relative(got[0], want[0]), "gradient": relative(got[1], want[1])}
    if name != "mixtral":
        return found

    def decode(params, tokens_BT, options):
        start_B = jnp.arange(BATCH, dtype=jnp.int32) % 3
        cache = init_cache(config, start_B, T)
        run = transformer.forward(params, config, tokens_BT[:, :-1], cache=cache, options=options)
        last = tokens_BT[:, -1:]
        return transformer.logits(params, config, last, cache=run.cache, options=options)

    step = jax.jit(decode, static_argnums=2)
    ours = step(placed, spread["tokens"], on_mesh)
    found["decode"] = relative(ours, step(params, batch()["tokens"], plain))
    return found


def main() -> None:
    for name, sizes, strategy, remat in CASES:
        print(json.dumps({"name": name, **case(name, sizes, strategy, remat)}), flush=True)


if __name__ == "__main__":
    main()
