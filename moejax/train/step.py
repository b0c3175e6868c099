"""One update, jitted, with the state donated and gradients accumulated over microbatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moejax.core import tree
from moejax.train.state import TrainState

Metrics = dict[str, jax.Array]
# (trainable, frozen, batch, rng) -> (loss, metrics). The loss is a mean over
# metrics["target_count"] things; metrics named *_count are sums, all others means like the loss.
LossFn = Callable[[tree.Tree, tree.Tree, Any, jax.Array], tuple[jax.Array, Metrics]]
# (parameters before the step, after it, its metrics) -> parameters.
Adjust = Callable[[tree.Tree, tree.Tree, Metrics], tree.Tree]
WEIGHT = "target_count"


def is_sum(name: str) -> bool:
    """Whether a metric is added up over microbatches; every other one is averaged by weight."""
    return name.endswith("_count")


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
    adjust: Adjust | None = None,
) -> Callable[[TrainState, tree.Tree, Any, jax.Array], tuple[TrainState, Metrics]]:
    """Builds ``step(state, frozen, batch, key) -> (state, metrics)``; `state` is donated.

    With `accumulation` A the batch's rows are cut into A microbatches, and the gradient is
    sum_i n_i grad_i / sum_i n_i with n_i the target tokens of microbatch i: what one big batch
    gives for a mean over tokens. (A loss that is no such mean, as the balance loss over a batch,
    is averaged with the same weights.)  Microbatch i of step s draws fold_in(fold_in(key, s), i).
    `adjust` has the last word on the parameters, for what is not learned by gradients.
    """

    def step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        if accumulation == 1:
            grads, metrics = _grads(loss_fn, state.params, frozen, batch, key)
        else:
            grads, metrics = _accumulate(loss_fn, state.params, frozen, batch, key, accumulation)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if adjust is not None:
            params = adjust(state.params, params, metrics)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def _grads(loss_fn, params, frozen, batch, key) -> tuple[tree.Tree, Metrics]:
    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, frozen, batch, key)
    metrics = {WEIGHT: jnp.ones(()), **metrics, "loss": loss}
    return grads, jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), metrics)


def _accumulate(loss_fn, params, frozen, batch, key, accumulation) -> tuple[tree.Tree, Metrics]:
    """Scans microbatches; sums of weighted gradients and metrics in float32, divided at the end."""
    micro = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)

    def one(batch, index):
        grads, metrics = _grads(loss_fn, params, frozen, batch, jax.random.fold_in(key, index))
        weight = metrics[WEIGHT]
        grads = jax.tree.map(lambda g: weight * g.astype(jnp.float32), grads)
        return grads, {k: m if is_sum(k) else weight * m for k, m in metrics.items()}

    def body(total, xs):
        return jax.tree.map(jnp.add, total, one(*xs)), None

    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(one, first, jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (grads, sums), _ = jax.lax.scan(body, zeros, (micro, jnp.arange(accumulation)))
    weight = jnp.maximum(sums[WEIGHT], 1e-9)
    grads = jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), grads, params)
    return grads, {k: m if is_sum(k) else m / weight for k, m in sums.items()}
