"""Run as a program with eight CPU devices: sharded layers against the dense oracle, JSON out.

With two last arguments (process id, port) it is one of two processes with four devices each; with
the argument "all" it goes through every strategy, mesh and convention, and on two processes through
every strategy.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from moejax.core import tree
from moejax.core.mesh import TOKEN_AXES, make_mesh
from moejax.core.sharding import param_spec
from moejax.moe import chunked
from moejax.moe.config import CONVENTIONS, MoEConfig
from moejax.moe.dense import dense_moe
from moejax.moe.expert_parallel import Parallel
from moejax.moe.layer import moe_layer, moe_shapes

D, F, BATCH, T = 8, 12, 16, 4
PLAIN = {**CONVENTIONS["mixtral"], "balance": "switch", "balance_scope": "global", "z_weight": 0.1}
GROUPS = {"num_groups": 4, "top_groups": 2}
MORE = {"qwen2_moe": {"shared_ffn": 16}, "deepseek_v2": GROUPS, "deepseek_v3": GROUPS}
CONFIGS = {
    "plain": MoEConfig(8, 2, **PLAIN, shared_ffn=16, shared_gate=True),
    "sixty_four": MoEConfig(64, 6, **PLAIN),
    "xft": MoEConfig(8, 3, jitter=0.1, balance_scope="global"),
    **{
        name: MoEConfig(8, 3, **{**fields, **MORE.get(name, {}), "balance_scope": "global"})
        for name, fields in CONVENTIONS.items()
    },
}
MESHES = {"ep8": (1, 1, 8, 1), "mixed": (1, 2, 2, 2), "dp_ep": (2, 1, 4, 1), "fsdp": (1, 4, 1, 2)}
LOADS = ("balanced", "skewed", "all_to_one")
ONE_TOKEN = (8, 1)  # [B, T]: one on each device
# mesh, strategy ("+": that keeps what experts computed), config, buffer factor, loads, and maybe an
# implementation and [B, T]
CASES = (
    ("ep8", "chunked", "plain", 1.25, LOADS),
    ("ep8", "ragged", "plain", 1.25, LOADS),
    ("ep8", "all_gather", "plain", 1.25, LOADS),
    ("ep8", "capacity", "plain", 1.25, LOADS[-1:]),
    ("ep8", "chunked+", "plain", 1.25, LOADS),
    ("mixed", "chunked", "xft", 1.25, LOADS[:1]),
    ("mixed", "chunked+", "xft", 1.25, LOADS[1:2]),
    ("dp_ep", "auto", "deepseek_v3", 1.25, LOADS),
    ("dp_ep", "chunked", "expert_choice", 1.25, LOADS[:1]),
    ("fsdp", "local", "plain", 1.25, LOADS),
)


# What two processes go through: each strategy, those of the first cases on one more mesh.
ON_TWO = (
    *CASES[:3],
    ("ep8", "capacity", "plain", 8.0, LOADS),
    ("mixed", "ragged", "plain", 1.25, LOADS),
    CASES[4],
    *(case for case in CASES if case[0] in ("fsdp", "dp_ep") and case[4] == LOADS),
)


def every_case() -> Iterator[tuple]:
    """All that claims to work; capacity with a buffer that holds everything."""
    factors = {"chunked": 1.25, "ragged": 1, "all_gather": 1, "capacity": 8}
    factors |= {"chunked+": 1.25, "capacity+": 8}
    for mesh, sizes in MESHES.items():
        for strategy, factor in factors.items():
            yield mesh, strategy, "plain", factor, LOADS
            yield mesh, strategy, "plain", factor, LOADS, None, ONE_TOKEN
            if sizes[2] > 1:
                others = [name for name in CONFIGS if name != "plain"]
                yield from ((mesh, strategy, name, factor, LOADS[1:2]) for name in others)
            for kernel in ("ref", "ragged_dot", "cpu") if mesh == "mixed" else ():
                yield mesh, strategy, "plain", factor, LOADS, kernel
    yield from (("fsdp", "local", name, 1.25, LOADS[1:2]) for name in CONFIGS)


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


def inputs(shape=(BATCH, T)):
    x = np.random.default_rng(1).normal(size=(*shape, D))
    x[..., 0] = 3.0
    return jnp.asarray(x, jnp.float32)


def mask(shape=(BATCH, T)):
    return jnp.arange(shape[0] * shape[1]).reshape(shape) % 5 > 0


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


def gradient(layer):
    """(loss, (y, stats)), gradients of parameters and x, for layer(params, x) -> y, stats."""

    def run(params, x):
        y, stats = layer(params, x)
        mixer = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)
        return jnp.sum(y * mixer) + stats.balance_loss + stats.z_loss, (y, stats)

    return jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))


@functools.cache
def oracle(name: str, shape=(BATCH, T)):
    config = CONFIGS[name]

    def single(params, x):
        how = {"mask_BT": mask(shape), "rng": jax.random.key(3)}
        stats = moe_layer(params, x, config, **how)[1]
        return dense_moe(params, x, config, **how), stats

    return gradient(single)


@functools.cache
def wanted(name: str, load: str, shape):
    return oracle(name, shape)(parameters(CONFIGS[name], load), inputs(shape))


def travel(mesh, strategy: str, factor: float) -> Parallel:
    return Parallel(mesh, strategy.removesuffix("+"), factor, keep=strategy.endswith("+"))


def compare(
    mesh, strategy: str, name: str, factor: float, loads, implementation=None, shape=(BATCH, T)
) -> Iterator[tuple[str, dict]]:
    config, parallel = CONFIGS[name], travel(mesh, strategy, factor)
    how = {"mask_BT": mask(shape), "rng": jax.random.key(3), "parallel": parallel}
    how["implementation"] = implementation
    ours = gradient(lambda p, x: moe_layer(p, x, config, **how))
    for load in loads:
        got = ours(*place(mesh, parameters(config, load), inputs(shape)))
        if jax.process_count() > 1:
            got = multihost_utils.process_allgather(got, tiled=True)
        (_, (y, stats)), grads = got
        (_, (y0, stats0)), grads0 = wanted(name, load, shape)
        losses, losses0 = ((s.balance_loss, s.z_loss) for s in (stats, stats0))
        yield (
            load,
            {
                "forward": relative(y, y0),
                "gradient": relative(grads, grads0),
                "counts": relative(stats.counts_E, stats0.counts_E),
                "losses": relative(losses, losses0),
                "dropped": float(np.asarray(stats.dropped)) - float(stats0.dropped),
            },
        )


def low_precision(mesh, strategy: str, factor: float) -> dict[str, float]:
    """Errors in bfloat16 against float32, over those of the dense definition in bfloat16."""
    config, parallel = CONFIGS["plain"], travel(mesh, strategy, factor)
    params, x = parameters(config, "balanced"), inputs()
    # Rounded beforehand: choices then are the same, and only arithmetic differs.
    low = [jax.tree.map(lambda a: a.astype(jnp.bfloat16), a) for a in (params, x)]
    params, x = (jax.tree.map(lambda a: a.astype(jnp.float32), a) for a in low)
    (_, (exact, _)), exact_grads = oracle("plain")(params, x)
    (_, (dense, _)), dense_grads = oracle("plain")(*low)
    layer = gradient(lambda p, x: moe_layer(p, x, config, mask_BT=mask(), parallel=parallel))
    (_, (y, _)), grads = layer(*place(mesh, *low))
    assert y.dtype == jnp.bfloat16

    def rms(ours, theirs):
        pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
        errors = [np.float32(np.asarray(a)) - np.asarray(b) for a, b in pairs]
        return float(np.sqrt(sum(np.sum(e**2) for e in errors)))

    return {
        "forward": rms(y, exact) / rms(dense, exact),
        "gradient": rms(grads, exact_grads) / rms(dense_grads, exact_grads),
    }


def written_out() -> Iterator[tuple[str, dict]]:
    """"chunked" as on a GPU, where only what parts leave over travels in a loop."""
    mesh = make_mesh(*MESHES["ep8"])
    with mock.patch.object(chunked, "platform", lambda: "gpu"):
        for strategy in ("chunked", "chunked+"):
            for load, found in compare(mesh, strategy, "plain", 1.25, LOADS[::2]):
                yield f"{strategy}-{load}", found


def main(arguments: list[str]) -> None:
    several = arguments[:1] == ["all"]
    place_of = arguments[1:] if several else arguments
    if place_of:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{place_of[1]}", 2, int(place_of[0]))
    else:
        in_bfloat16 = ("chunked+", 1.25), ("chunked", 1.25), ("ragged", 1), ("all_gather", 1)
        for strategy, factor in in_bfloat16 if several else in_bfloat16[:1]:
            found = low_precision(make_mesh(*MESHES["ep8"]), strategy, factor)
            print(json.dumps({"name": f"bfloat16-{strategy}", **found}), flush=True)
        for load, found in written_out():
            print(json.dumps({"name": f"written-out-{load}", **found}), flush=True)
    if place_of:
        cases = iter(ON_TWO if several else ON_TWO[:2])
    else:
        cases = every_case() if several else iter(CASES)
    for mesh, *case in cases:
        strategy, name, factor, _, *more = case
        for load, found in compare(make_mesh(*MESHES[mesh]), *case):
            line = {"name": f"{mesh}-{strategy}-{name}-{load}-{factor:g}", **found}
            line["name"] += "".join(f"-{each}" for each in more)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
