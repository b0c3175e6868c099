"""Run as a program with eight CPU devices: sharded layers against the dense oracle, JSON out.

With two arguments (process id, port) it is one of two processes with four devices each.
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from moejax.core import tree
from moejax.core.mesh import TOKEN_AXES, make_mesh
from moejax.core.sharding import param_spec
from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.moe.dense import dense_moe
from moejax.moe.expert_parallel import Parallel
from moejax.moe.layer import moe_layer, moe_shapes

D, F, BATCH, T = 8, 12, 16, 4
PLAIN = {**CONVENTIONS["mixtral"], "balance": "switch", "balance_scope": "global", "z_weight": 0.1}
CONFIG = MoEConfig(8, 2, **PLAIN, shared_ffn=16, shared_gate=True)
XFT = MoEConfig(8, 3, noise=False, balance_scope="global")
MESHES = {"ep8": (1, 1, 8, 1), "mixed": (1, 2, 2, 2), "dp_ep": (2, 1, 4, 1), "fsdp": (1, 4, 1, 2)}


def parameters(config: MoEConfig, load: str):
    rng = np.random.default_rng(0)
    params: dict = {}
    for path, shape in moe_shapes(D, F, config, True).items():
        part, name = path.split("/")
        params.setdefault(part, {})[name] = jnp.asarray(0.4 * rng.normal(size=shape), jnp.float32)
    if load != "balanced" and config.gate == "linear":
        push = np.zeros(params["router"]["w_out"].shape, np.float32)
        # x has a first number of 3, so this is a logit of 3 (skewed) or 60 (all to expert 1 and 0).
        push[0, :2] = 1.0 if load == "skewed" else 20.0
        params["router"]["w_out"] = params["router"]["w_out"] + push
    return params


def inputs():
    x = np.random.default_rng(1).normal(size=(BATCH, T, D))
    x[..., 0] = 3.0
    return jnp.asarray(x, jnp.float32)


def place(mesh, params, x):
    specs = tree.map_with_path(lambda path, w: param_spec(path, w.shape, mesh), params)
    put = lambda a, s: jax.make_array_from_callback(  # noqa: E731
        a.shape, NamedSharding(mesh, s), lambda i, a=np.asarray(a): a[i]
    )
    return jax.tree.map(put, params, specs), put(x, PartitionSpec(TOKEN_AXES))


def relative(ours, theirs) -> float:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    errors = []
    for a, b in pairs:
        a, b = np.asarray(a), np.asarray(b)
        errors.append(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)))
    return max(errors)


def case(mesh, strategy: str, load: str, config: MoEConfig, factor: float = 1.25) -> dict:
    params, x = parameters(config, load), inputs()
    mixer = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)
    mask = jnp.arange(BATCH * T).reshape(BATCH, T) % 5 > 0
    parallel = Parallel(mesh, strategy, factor)

    def run(params, x, layer):
        y, stats = layer(params, x)
        extra = 0.0 if stats is None else stats.balance_loss + stats.z_loss
        return jnp.sum(y * mixer) + extra, (y, stats)

    def ours(params, x):
        return moe_layer(params, x, config, mask_BT=mask, parallel=parallel)

    def single(params, x):
        return dense_moe(params, x, config), moe_layer(params, x, config, mask_BT=mask)[1]

    grad = jax.value_and_grad(run, (0, 1), has_aux=True)
    want = jax.jit(lambda p, x: grad(p, x, single))(params, x)
    got = jax.jit(lambda p, x: grad(p, x, ours))(*place(mesh, params, x))
    got = multihost_utils.process_allgather(got, tiled=True) if jax.process_count() > 1 else got
    (_, (y, stats)), grads = got
    (_, (y0, stats0)), grads0 = want
    return {
        "forward": relative(y, y0),
        "gradient": relative(grads, grads0),
        "counts": relative(stats.counts_E, stats0.counts_E),
        "losses": relative(
            (stats.balance_loss, stats.z_loss), (stats0.balance_loss, stats0.z_loss)
        ),
        "dropped": float(np.asarray(stats.dropped)),
    }


def cases():
    for load in ("balanced", "skewed", "all_to_one"):
        yield "ep8", "chunked", load, CONFIG, 1.25
    yield "ep8", "all_gather", "skewed", CONFIG, 1.25
    yield "ep8", "capacity", "all_to_one", CONFIG, 1.25
    yield "ep8", "capacity", "all_to_one", CONFIG, 8.0
    yield "mixed", "chunked", "all_to_one", CONFIG, 1.25
    yield "dp_ep", "auto", "balanced", CONFIG, 1.25
    yield "fsdp", "local", "skewed", CONFIG, 1.25


def main() -> None:
    if len(sys.argv) > 2:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[1]))
    meshes = {name: make_mesh(*sizes) for name, sizes in MESHES.items()}
    if len(sys.argv) > 2:
        wanted = [("ep8", "chunked", "all_to_one", CONFIG, 1.25)]
    else:
        wanted = [*cases(), ("mixed", "chunked", "xft", XFT, 1.25)]
    for mesh, strategy, load, config, factor in wanted:
        found = case(meshes[mesh], strategy, load, config, factor)
        name = f"{mesh}-{strategy}-{load}-{factor}"
        print(json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    main()
