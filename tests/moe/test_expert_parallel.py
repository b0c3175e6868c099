"""Sharded == unsharded, forward and gradient, for strategies, mesh shapes and loads."""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from moejax import moe
from moejax.core.chips import CHIPS
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.core.platform import compiling_for
from moejax.core.precision import TOLERANCE
from moejax.moe.choose import STRATEGIES, Load, choose, worth_keeping
from moejax.moe.expert_parallel import Parallel, _check, _say, explain
from moejax.moe.ragged import emulated_ragged_all_to_all
from tests.fake_devices import ROOT, absent, on_two_processes, results, start
from tests.moe.expert_parallel_cases import CASES, ON_TWO, every_case

PROGRAM = "moe/expert_parallel_cases.py"


def assert_equal(name: str, found: dict[str, float]) -> None:
    for what in ("forward", "gradient", "counts", "losses"):
        assert found[what] <= TOLERANCE["float32"], (name, what, found)
    assert found["dropped"] == 0, (name, found)


def check(found: list[dict]) -> None:
    for one in found:
        name = one.pop("name")
        if name.startswith("bfloat16"):
            assert one["forward"] < 1.5 and one["gradient"] < 1.5, (name, one)
        elif name.startswith("ep8-capacity-plain-all_to_one-1.25"):
            # All go to two experts on two shards: 8 pairs of a device for each, of which 4 fit.
            assert one["dropped"] == 0.5 and one["forward"] > 0.1
        else:
            assert_equal(name, one)


def test_sharded_equals_dense_on_eight_devices():
    found = results(start(PROGRAM, 8))
    assert len(found) == 5 + sum(len(loads) for *_, loads in CASES)
    check(found)


def test_sharded_equals_dense_on_two_processes():
    for found in on_two_processes(PROGRAM):
        assert len(found) == 6
        check(found)


def equations(jaxpr):
    """All of it, and of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def weights_summed(jaxpr) -> list[tuple[int, ...]]:
    """Shapes of matrices that are summed whole over the expert axis."""
    return [
        v.aval.shape
        for equation in equations(jaxpr)
        if "psum" in equation.primitive.name and "expert" in equation.params["axes"]
        for v in equation.invars
        if v.aval.ndim == 2
    ]


def test_a_device_draws_for_its_own_tokens_alone():
    """A slice of what is drawn for all: on 256 devices, 256 times the work and the memory."""
    config = moe.MoEConfig(4, 2, jitter=0.1)
    params = moe.init_moe(jax.random.key(0), 8, 16, config)
    mesh = absent(2, 2, 4, 1)

    def layer(params, x, rng):
        return moe.moe_layer(params, x, config, parallel=Parallel(mesh, "chunked"), rng=rng)

    made = jax.make_jaxpr(layer)(params, jnp.ones((16, 5, 8)), jax.random.key(1))
    draws = [e for e in equations(made.jaxpr) if e.primitive.name == "random_bits"]
    assert {e.outvars[0].aval.shape for e in draws} == {(5, 3), (5, 8)}  # noise, jitter


@pytest.mark.parametrize("fsdp", [1, 2])
@pytest.mark.parametrize(("d_ff", "whole"), [(16, []), (18, [(18, 8)])])
def test_the_shared_expert_travels_in_pieces(d_ff, whole, fsdp):
    """Forward and gradient, wherever the shards divide it: an all-reduce has twice the bytes."""
    config = moe.MoEConfig(4, 2)
    params = moe.init_moe(jax.random.key(0), 8, d_ff, config)
    mesh = absent(1, fsdp, 4, 1)

    def loss(params, x):
        return jnp.sum(moe.moe_layer(params, x, config, parallel=Parallel(mesh, "chunked"))[0])

    made = jax.make_jaxpr(jax.grad(loss))(params, jnp.ones((8, 4, 8)))
    router = {w.shape for w in jax.tree.leaves(params["router"])}
    whole = [] if fsdp > 1 else whole  # it is split along its other dim then, which 4 divides
    assert set(weights_summed(made.jaxpr)) - router == set(whole)


@pytest.mark.slow
def test_every_strategy_on_two_processes():
    assert {case[1].removesuffix("+") for case in ON_TWO} == {*STRATEGIES, "auto"}
    for found in on_two_processes(PROGRAM, "all", timeout_s=3000):
        assert len(found) == sum(len(loads) for *_, loads in ON_TWO)
        check(found)


@pytest.mark.slow
def test_every_strategy_mesh_and_convention():
    found = results(start(PROGRAM, 8, "all"), timeout_s=3000)
    assert len(found) == 8 + sum(len(case[4]) for case in every_case())
    check(found)


def exchanged(exchange):
    """One device's worth of `ragged_all_to_all`s for all P devices, by vmap with an axis name."""
    return jax.vmap(
        lambda *arrays: exchange(*arrays, axis_name="shards"), axis_name="shards", in_axes=0
    )


def by_the_book(operand, output, starts, sizes, places, received):
    """What the documentation of `jax.lax.ragged_all_to_all` says, slice by slice."""
    result = np.array(output)
    for sender, receiver in np.ndindex(sizes.shape):
        start, size, place = (a[sender, receiver] for a in (starts, sizes, places))
        assert received[receiver, sender] == size
        result[receiver, place : place + size] = operand[sender, start : start + size]
    return result


def test_the_emulated_exchange_has_the_documented_semantics():
    # The example of its documentation: two devices.
    arrays = (
        np.array([[1, 2, 2], [3, 4, 0]]),
        np.zeros((2, 4), int),
        np.array([[0, 1], [0, 1]]),
        np.array([[1, 2], [1, 1]]),
        np.array([[0, 0], [1, 2]]),
        np.array([[1, 1], [2, 1]]),
    )
    got = exchanged(emulated_ragged_all_to_all)(*map(jnp.asarray, arrays))
    assert got.tolist() == [[1, 3, 0, 0], [2, 2, 4, 0]] == by_the_book(*arrays).tolist()
    # Four devices, empty slices, gaps, and an output that shows where nothing was written.
    draw = np.random.default_rng(0)
    sizes = draw.integers(0, 4, (4, 4))
    sizes[1] = 0
    sizes[:, 2] = 0
    starts = np.cumsum(sizes, axis=1) - sizes + np.arange(4)  # a gap before each slice
    places = np.cumsum(sizes, axis=0) - sizes + np.arange(4)[:, None]
    operand, output = draw.normal(size=(4, 20, 3)), draw.normal(size=(4, 20, 3))
    rest = (starts, sizes, places, sizes.T)
    floats = [jnp.asarray(a, jnp.float32) for a in (operand, output)]
    run = lambda a, b: exchanged(emulated_ragged_all_to_all)(a, b, *map(jnp.asarray, rest))  # noqa: E731
    np.testing.assert_array_equal(run(*floats), by_the_book(*map(np.asarray, floats), *rest))
    # Linear in both: the gradient is its transpose, <J t, c> = <t, J^T c> for any t and c.
    cotangent = jnp.asarray(draw.normal(size=(4, 20, 3)), jnp.float32)
    back = jax.vjp(run, *floats)[1](cotangent)
    forth = sum(jnp.vdot(a, b) for a, b in zip(back, floats, strict=True))
    np.testing.assert_allclose(forth, jnp.vdot(run(*floats), cotangent), rtol=1e-5)


def test_the_layer_alone_on_a_mesh():
    """The README's example, as it is printed there."""
    _, _, part = (ROOT / "README.md").read_text(encoding="utf-8").partition("### The layer alone")
    example = part.split("```python\n")[1].split("```")[0]
    assert len(example.splitlines()) <= 20
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102
    grads, stats = names["grads"], names["stats"]
    assert stats.counts_E.sum() == 8 * 4 * 2 and stats.dropped == 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert jax.tree.structure(grads) == jax.tree.structure(names["params"])


def test_auto_picks_what_is_fastest_of_what_fits():
    decode = choose(Load(tokens=4, top_k=8, shards=8, d_model=2048, d_ff=1408))
    assert decode.strategy == "all_gather"
    for chip in CHIPS:
        for shards in (8, 32):
            train = choose(Load(4096, 6, shards, 2048, 1408), chip)
            assert train.strategy == "chunked" and "4096 tokens" in train.reason
            assert train.memory_bytes["all_gather"] > 4 * train.memory_bytes["chunked"]
    # all_gather sends less there, and was once chosen for it.
    large = choose(Load(16384, 8, 8, 2048, 1408), "v5e")
    assert large.strategy == "chunked" and "(too much)" in large.reason
    assert choose(Load(4096, 6, 1, 2048, 1408)).strategy == "local"
    with pytest.raises(InputError, match="none of the 4 known"):
        choose(Load(4, 8, 8, 2048, 1408), chip="v9")


def test_auto_says_why_and_takes_the_chip_at_hand(caplog):
    config = moe.MoEConfig(8, 2, **moe.CONVENTIONS["mixtral"])
    parallel = Parallel(make_mesh(expert=len(jax.devices())))
    params = moe.init_moe(jax.random.key(0), 16, 32, config)
    _say.cache_clear()
    with caplog.at_level(logging.INFO, logger=_say.__module__):
        for _ in range(2):  # what is only traced says it too
            jax.eval_shape(
                lambda x: moe.moe_layer(params, x, config, parallel=parallel), jnp.ones((8, 4, 16))
            )
    (said,) = (r.getMessage() for r in caplog.records)
    assert said == "moe_layer, strategy 'auto': 1 expert shard: nothing to exchange"
    sizes = {"data": 1, "fsdp": 1, "expert": 8, "tensor": 1}
    fake = dataclasses.replace(parallel, mesh=FakeMesh(**sizes))  # type: ignore[arg-type]
    for kind, chip in (("TPU v6 lite", "v6e"), ("TPU v5", "v5p"), ("", "v5p")):
        with compiling_for("tpu", kind):
            found = explain(fake, config, (64, 512, 2048), 1408)
        assert found.strategy == "chunked"
        assert f"4096 tokens x top-2 over 8 expert shards on {chip}" in found.reason


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
    with pytest.raises(InputError, match="strategy 'ring' is none of the 6"):
        Parallel(mesh, "ring")
    with pytest.raises(InputError, match="factor=0"):
        Parallel(mesh, factor=0)
    with pytest.raises(InputError, match="lacks .*expert"):
        Parallel(Mesh(np.asarray(jax.devices()), ("data",)))
    with pytest.raises(InputError, match="takes 1001 devices"):
        make_mesh(expert=7, data=11, fsdp=13)


def test_rows_are_kept_where_products_are_dearer_than_memory():
    """By the plans of the 8 x 1.3B, whose D is 2,048 and F 5,504."""
    found = {name: worth_keeping(chip, 2048, 5504) for name, chip in CHIPS.items()}
    assert found == {"v5p": True, "v5e": False, "v6e": False, "h100": False}
    assert worth_keeping(CHIPS["h100"], 4096, 14336) and worth_keeping(None, 8, 8)
