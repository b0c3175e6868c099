"""Sharded == unsharded, forward and gradient, for strategies, mesh shapes and loads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from moejax import moe
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.core.precision import TOLERANCE
from moejax.moe.choose import Load, choose
from moejax.moe.expert_parallel import Parallel, _check
from tests.fake_devices import on_two_processes, results, start

PROGRAM = "moe/expert_parallel_cases.py"


def assert_equal(name: str, found: dict[str, float]) -> None:
    for what in ("forward", "gradient", "counts", "losses"):
        assert found[what] <= TOLERANCE["float32"], (name, what, found)
    assert found["dropped"] == 0, (name, found)


def test_sharded_equals_dense_on_eight_devices():
    found = {one.pop("name"): one for one in results(start(PROGRAM, 8))}
    assert len(found) == 10
    # All go to two experts on two shards: 8 pairs of a device for each, of which 4 fit.
    short = found.pop("ep8-capacity-all_to_one-1.25")
    assert short["dropped"] == 0.5 and short["forward"] > 0.1
    for name, one in found.items():
        assert_equal(name, one)


def test_sharded_equals_dense_on_two_processes():
    for (one,) in on_two_processes(PROGRAM):
        assert_equal(one.pop("name"), one)


def test_the_layer_alone_on_a_mesh():
    """The README's example."""
    config = moe.MoEConfig(8, 2, **moe.CONVENTIONS["mixtral"])
    params = moe.init_moe(jax.random.key(0), 16, 32, config)
    parallel = Parallel(make_mesh(expert=len(jax.devices())))
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4, 16)), jnp.float32)

    @jax.jit
    def step(params, x_BTD):
        def loss(params):
            y_BTD, stats = moe.moe_layer(params, x_BTD, config, parallel=parallel)
            return jnp.mean(y_BTD**2) + stats.balance_loss, stats

        return jax.grad(loss, has_aux=True)(params)

    grads, stats = step(params, x_BTD)
    assert stats.counts_E.sum() == 8 * 4 * 2 and stats.dropped == 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_auto_picks_what_sends_least():
    decode = choose(Load(tokens=4, top_k=8, shards=8, d_model=2048, d_ff=1408))
    assert decode.strategy == "all_gather"
    train = choose(Load(tokens=4096, top_k=6, shards=32, d_model=2048, d_ff=1408))
    assert train.strategy == "chunked" and "4096 tokens" in train.reason
    assert choose(Load(4096, 6, 1, 2048, 1408)).strategy == "local"
    with pytest.raises(InputError, match="none of the 4 known"):
        choose(Load(4, 8, 8, 2048, 1408), chip="v9")


class FakeMesh:
    """As many devices as wanted: only the sizes are looked at."""

    def __init__(self, **sizes: int):
        self.shape = sizes


def test_bad_input_names_both_numbers():
    config = moe.MoEConfig(8, 2, **moe.CONVENTIONS["mixtral"])
    with pytest.raises(InputError, match="8 experts do not divide by an expert axis of 3"):
        _check(config, (6, 4, 16), FakeMesh(data=1, fsdp=1, expert=3, tensor=1))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch of 6 rows does not divide by the 4 devices"):
        _check(config, (6, 4, 16), FakeMesh(data=1, fsdp=2, expert=2, tensor=1))  # type: ignore[arg-type]
    mesh = make_mesh(data=len(jax.devices()))
    with pytest.raises(InputError, match="strategy 'ring' is none of the 5"):
        Parallel(mesh, "ring")
    with pytest.raises(InputError, match="factor=0"):
        Parallel(mesh, factor=0)
    with pytest.raises(InputError, match="lacks .*expert"):
        Parallel(Mesh(np.asarray(jax.devices()), ("data",)))
    with pytest.raises(InputError, match="takes 1001 devices"):
        make_mesh(expert=7, data=11, fsdp=13)
