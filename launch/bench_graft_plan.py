"""Rows of LLM Modules at the paper's size for chips that are not here: memory and time, in parts.

Qwen2-1.5B (bfloat16, frozen) lends its last states to GPT-Neo-125M with Qwen's vocabulary (its new
head of 117M, tied to the embedding) through the paper's bridge; one row of 2,048 tokens, AdamW with
float32 state, bfloat16 arithmetic, every block kept. Source, bridge, new head and the whole step
are compiled for one chip, each on its own; times are the least the chip allows
(`moejax.aot.roofline`), nothing runs. What the step takes beyond bridge and head is put down to the
target's blocks.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

from configs import graft as graft_config
from launch.bench_row import Row, Wanted, measure_in_process
from launch.graft_setup import Setup
from moejax.aot import topology
from moejax.core.chips import chip_of
from moejax.core.errors import InputError
from moejax.io.loaded import Loaded
from moejax.methods.graft import GraftConfig
from moejax.models.config import ModelConfig
from moejax.models.families import by_name

# One chip of each is compiled for; the smallest host has several.
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "h100": "h100x1"}
SOURCE, TARGET, TOKENS = "qwen2-1.5b", "gpt-neo-125m", 2048
FIGURE = "{} " + f"{SOURCE} -> {TARGET}, 1 x {TOKENS} tokens"


def rows(peer: bool, wanted: Wanted) -> Iterator[Row]:
    """Per chip: memory of the whole uncached step, and the times of its parts."""
    del peer
    for chip, name in CHIPS.items():
        figure = FIGURE.format(chip)
        if not wanted(figure):
            continue
        try:
            found = measure_in_process(
                "launch.bench_graft_plan", name, environment=topology.environment(name),
                timeout_s=1800,
            )
        except InputError as error:
            yield Row(figure, None, "", how=f"not measured: {error}")
            continue
        room = chip_of(name).hbm_bytes
        whole, cached = found["whole"], found["cached"]
        how = (
            f"source {found['source_argument'] / 1e9:.2f} GB of weights, "
            f"{found['source_temp'] / 1e9:.2f} temporary; target, head and bridge with AdamW "
            f"{found['cached_argument'] / 1e9:.2f}, {found['cached_temp'] / 1e9:.2f} temporary; "
            f"{cached / 1e9:.2f} GB with states from disk; chip {room / 1e9:.1f}"
        )
        yield Row(f"{figure}, HBM", whole / 1e9, "GB", f"<= {room / 1e9:.1f}", how=how)
        parts = {
            "source": found["source_s"],
            "bridge": found["bridge_s"],
            "new head": found["head_s"],
        }
        total = found["source_s"] + found["cached_s"]
        parts["target's blocks"] = total - sum(parts.values())
        how = ", ".join(f"{n} {1e3 * s:.2f} ms ({s / total:.0%})" for n, s in parts.items())
        yield Row(f"{figure}, step at least", 1e3 * total, "ms", how=how)


def measure(name: str) -> dict[str, float]:
    """Compiles source, cached step, and steps of the bridge and the head alone."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, PartitionSpec

    from launch.graft_loss import make_loss
    from moejax.aot import compile as aot
    from moejax.core import tree
    from moejax.methods.graft import bridge_shapes
    from moejax.methods.graft_forward import source_states
    from moejax.models.params import abstract_params
    from moejax.train.optim import OptimConfig, make_optimizer
    from moejax.train.state import init_state
    from moejax.train.step import make_train_step

    setup = _setup()
    source, target, graft = setup.source.config, setup.target.config, setup.graft
    mesh = Mesh(np.asarray(topology.devices(name)[:1]).reshape(1), ("data",))

    def array(shape, dtype):
        return aot.abstract(shape, dtype, mesh, PartitionSpec())

    def placed(shapes):
        return jax.tree.map(lambda x: array(x.shape, x.dtype), shapes)

    row = array((1, TOKENS), jnp.int32)
    batch = {n: row for n in ("tokens", "segment_ids", "positions", "limits")}
    batch["loss_mask"] = array((1, TOKENS), jnp.bool_)
    batch["states"] = array((1, TOKENS, graft.read_size), jnp.bfloat16)
    optimizer = make_optimizer(OptimConfig("adamw", 1e-4, "constant", 0, 1.0), 100)

    def step(loss, trainable):
        state = placed(jax.eval_shape(lambda p: init_state(p, optimizer), trainable))
        key = placed(jax.eval_shape(lambda: jax.random.key(0)))
        return aot.compile_for(make_train_step(loss, optimizer), state, {}, batch, key, donate=(0,))

    states = aot.compile_for(
        lambda p, t: source_states(p, source, graft.taps, t, options=setup.options)[0],
        placed(abstract_params(source, "bfloat16")),
        row,
    )
    params = abstract_params(target, "float32")
    bridge = tree.unflatten(
        {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in bridge_shapes(graft, target).items()}
    )
    whole = step(make_loss(setup), {"bridge": bridge, "target": params})
    x = jax.ShapeDtypeStruct((1, TOKENS, target.d_model), jnp.float32)
    head = step(_head_loss(target), {"embed": {"tokens": params["embed"]["tokens"]}, "x": x})
    times = {"source": states, "cached": whole, "head": head}
    times["bridge"] = step(_bridge_loss(graft, target), bridge)
    found = {f"{n}_s": _least_s(compiled, name) for n, compiled in times.items()}
    for part, compiled in (("source", states), ("cached", whole)):
        memory = aot.memory(compiled)
        found[part] = memory.total_bytes
        found[f"{part}_argument"] = memory.argument_bytes
        found[f"{part}_temp"] = memory.temp_bytes
    # The source runs before the step: its weights stay, of what is temporary the larger counts.
    extra = max(0, found["source_temp"] - found["cached_temp"])
    found["whole"] = found["cached"] + found["source_argument"] + extra
    return found


def _setup() -> Setup:
    """Models and bridge of the paper, without weights or texts."""
    config = graft_config.get_config()
    config.compute.dtype = "bfloat16"
    source = by_name("qwen2").presets[SOURCE]
    target = dataclasses.replace(
        by_name("gpt_neo").presets[TARGET], vocab_size=source.vocab_size, tie_embeddings=True
    )
    none: Any = None
    graft = GraftConfig.paper(source.d_model, target.d_model)
    return Setup(config, Loaded(none, source, none), Loaded(none, target, none), graft, none)


def _least_s(compiled, name: str) -> float:
    from moejax.aot import hlo, hlo_cost
    from moejax.aot.roofline import roofline

    cost = hlo_cost.cost(hlo.parse(compiled.as_text()))
    return roofline(cost.flops, cost.traffic_bytes, [], chip_of(name)).step_s


def _bridge_loss(graft: GraftConfig, target: ModelConfig):
    """Of what enters the target's blocks, for a step of the bridge alone."""
    import jax.numpy as jnp

    from moejax.methods.graft import insert_before
    from moejax.methods.graft_forward import make_reading

    def loss(trainable, frozen, batch, rng):
        del frozen, rng
        reading = make_reading(
            trainable, graft, batch["states"], batch["limits"], compute_dtype="bfloat16"
        )
        x_BTD = jnp.zeros((1, TOKENS, target.d_model), jnp.bfloat16)
        entered = insert_before({"source": reading})(x_BTD)
        squared = jnp.mean(jnp.square(entered.astype(jnp.float32)))
        return squared, {"target_count": jnp.float32(TOKENS)}

    return loss


def _head_loss(target: ModelConfig):
    """Of given hidden states, for a step of the head alone."""
    import jax.numpy as jnp

    from moejax.train.loss import token_nll

    def loss(trainable, frozen, batch, rng):
        del frozen, rng
        hidden = trainable["x"].astype(jnp.bfloat16)
        nll = token_nll({"embed": trainable["embed"]}, target, hidden, batch["tokens"])
        return jnp.mean(nll), {"target_count": jnp.float32(TOKENS)}

    return loss


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
