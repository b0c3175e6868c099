"""Remat "dots" computes no product of experts again, whatever kernel makes it; none sends twice."""

import contextlib

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from jax.extend.core import Var

from moejax.core.platform import compiling_for
from moejax.models.options import REMAT_POLICIES, ForwardOptions
from moejax.moe.config import MoEConfig
from moejax.moe.expert_parallel import Parallel
from moejax.moe.layer import moe_layer
from moejax.moe.shapes import init_moe
from moejax.ops.grouped_matmul import PLATFORM
from tests.fake_devices import absent


def count(jaxpr) -> int:
    """Matrix products in all that it calls, but those of many small ones at once (batch dims).

    A kernel whose result nothing reads does not count: XLA drops it, jax leaves it in.
    """
    read = {v for equation in jaxpr.eqns for v in equation.invars if isinstance(v, Var)}
    read |= {v for v in jaxpr.outvars if isinstance(v, Var)}
    found = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if read.isdisjoint(equation.outvars):
            continue
        found += name in ("ragged_dot_general", "pallas_call")
        found += name == "dot_general" and not params["dimension_numbers"][1][0]
        found += sum(count(inner) for inner in jax.extend.core.jaxprs_in_params(params))
    return found


def occurs(jaxpr, *names: str) -> int:
    """How often primitives of those names stand in all that it calls."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name in names
        inside = jax.extend.core.jaxprs_in_params(equation.params)
        found += sum(occurs(inner, *names) for inner in inside)
    return found


@pytest.mark.parametrize("strategy", [None, "chunked", "ragged", "all_gather"])
@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_no_policy_chooses_sorts_or_spreads_the_shared_expert_again(policy, strategy):
    config = MoEConfig(4, 2)
    params = init_moe(jax.random.key(0), 16, 32, config)
    parallel = None
    if strategy:
        parallel = Parallel(absent(1, 1, 2, 1), strategy)

    def loss(params, x):
        return jnp.sum(jnp.sin(moe_layer(params, x, config, parallel=parallel)[0]))

    again = jax.checkpoint(loss, policy=REMAT_POLICIES[policy])
    plain, found = (
        jax.make_jaxpr(jax.grad(f, (0, 1)))(params, jnp.ones((2, 8, 16))).jaxpr
        for f in (loss, again)
    )
    assert occurs(found, "sort", "top_k") == occurs(plain, "sort", "top_k") > 0
    # Of the shared expert forward, of gradients of what is gathered; "all_gather" adds up y so too.
    spread = [occurs(one, "reduce_scatter") for one in (plain, found)]
    assert spread[1] - spread[0] == (strategy == "all_gather") and (spread[0] > 0) == bool(strategy)


@pytest.mark.parametrize("implementation", ["ref", "ragged_dot", "cpu", "gpu", "tpu"])
def test_dots_keeps_the_products_of_experts(implementation):
    config = MoEConfig(4, 3)
    params = init_moe(jax.random.key(0), 128, 256, config)
    x = jnp.ones((2, 8, 128))

    def loss(params, x):
        return jnp.sum(jnp.sin(moe_layer(params, x, config, implementation=implementation)[0]))

    def num_products(policy):
        wanted = loss if policy is None else jax.checkpoint(loss, policy=REMAT_POLICIES[policy])
        return count(jax.make_jaxpr(jax.grad(wanted, (0, 1)))(params, x).jaxpr)

    device = PLATFORM.get(implementation)
    with compiling_for(device) if device else contextlib.nullcontext():
        plain, dots, full = (num_products(policy) for policy in (None, "dots", "full"))
    assert plain == dots < full


@pytest.mark.parametrize("remat", ["nothing", "dots", "full"])
def test_what_is_kept_of_an_exchange_is_neither_sent_nor_computed_again(remat):
    """Of three ways there and two back the backward pass has one each, of eleven products six.

    What the parts leave over travels in a loop, which has the rest.
    """
    config = MoEConfig(4, 2)
    params = init_moe(jax.random.key(0), 16, 32, config)
    options = ForwardOptions(remat=remat, parallel=Parallel(absent(1, 1, 2, 1), "chunked"))

    def traced(parallel):
        def loss(params, x):
            return jnp.sum(jnp.sin(moe_layer(params, x, config, parallel=parallel)[0]))

        if options.policy is not None:
            loss = jax.checkpoint(loss, policy=options.policy)
        with compiling_for("gpu"):  # the turns of the parts are written out there
            return jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, jnp.ones((4, 16, 16))).jaxpr

    plain, found = traced(options.parallel), traced(options.travel)
    assert options.travel.keep == (remat != "full")
    fewer = occurs(plain, "all_to_all") - occurs(found, "all_to_all")
    parts = 2
    assert fewer == (parts if options.travel.keep else 0)
