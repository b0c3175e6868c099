"""One update, jitted, with the state donated and gradients accumulated over microbatches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.core import narrow, tree
from moejax.core.errors import InputError
from moejax.core.mesh import TOKEN_AXES
from moejax.core.platform import overlap_options
from moejax.train.state import TrainState

Metrics = dict[str, jax.Array]
# (trainable, frozen, batch, rng) -> (loss, metrics). The loss is a mean over
# metrics["target_count"] things; metrics named *_count are sums, all others means like the loss.
LossFn = Callable[[tree.Tree, tree.Tree, Any, jax.Array], tuple[jax.Array, Metrics]]
# (parameters before the step, after it, its metrics) -> parameters.
Adjust = Callable[[tree.Tree, tree.Tree, Metrics], tree.Tree]
WEIGHT = "target_count"
ACCUMULATION_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How an update is computed.

    Attributes:
      accumulation: microbatches per update; divides the rows of a batch.
      accumulation_dtype: of the sum of their gradients.
      skip_nonfinite: leave parameters and optimizer as they are after a step whose loss or
        gradient is not finite; metrics then hold skipped_count, 1 for such a step.
      mesh: where the state and the batch are split; None is one device.
      shardings: of the state, as `moejax.train.placement.place` has them; None lets XLA choose.
      grad_dtype: of the gradients of blocks' weights until the optimizer takes them as float32
        (`moejax.core.narrow`): the dtype of the arithmetic, for losses that cast every weight
        to it before anything else. None: that of the weights.
      overlap: tell the compiler to run collectives beside arithmetic
        (`moejax.core.platform.overlap_options`).
    """

    accumulation: int = 1
    accumulation_dtype: str = "float32"
    skip_nonfinite: bool = False
    mesh: Mesh | None = None
    shardings: TrainState | None = None
    grad_dtype: str | None = None
    overlap: bool = True

    def __post_init__(self):
        if self.accumulation_dtype not in ACCUMULATION_DTYPES:
            raise InputError(
                f"accumulation_dtype {self.accumulation_dtype!r} is unknown: use "
                f"{', '.join(ACCUMULATION_DTYPES)}"
            )


def is_sum(name: str) -> bool:
    """Whether a metric is added up over microbatches; every other one is averaged by weight."""
    return name.endswith("_count")


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    options: StepOptions = StepOptions(),
    adjust: Adjust | None = None,
) -> jax.stages.Wrapped:
    """Builds the jitted ``step(state, frozen, batch, key) -> (state, metrics)``; donates `state`.

    With A microbatches the batch's rows are cut into A parts, and the gradient is
    sum_i n_i grad_i / sum_i n_i with n_i the target tokens of microbatch i: what one big batch
    gives for a mean over tokens. (A loss that is no such mean, as the balance loss over a batch,
    is averaged with the same weights, and with equal ones if no token counts.)  Microbatch i of
    step s draws fold_in(fold_in(key, s), i). `adjust` has the last word on the parameters, for what
    is not learned by gradients.

    A learning-rate schedule is asked for `state.step`: steps that are skipped pass for it too, so
    it ends with the run. Moments and their corrections count the updates that were made.
    """

    def step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        if options.accumulation == 1:
            grads, metrics = _grads(loss_fn, state.params, frozen, batch, key, options)
        else:
            grads, metrics = _accumulate(loss_fn, state.params, frozen, batch, key, options)
        grads = _placed(grads, options)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        metrics["grad_norm"] = optax.tree.norm(grads)
        opt_state = _at_step(state.opt_state, state.step)
        updates, opt_state = optimizer.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if adjust is not None:
            params = adjust(state.params, params, metrics)
        if options.skip_nonfinite:
            fine = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
            metrics["skipped_count"] = 1.0 - fine.astype(jnp.float32)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(fine, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
        return TrainState(state.step + 1, params, opt_state), metrics

    if options.shardings is None:
        return jax.jit(step, donate_argnums=0)
    assert options.mesh is not None
    everywhere = NamedSharding(options.mesh, PartitionSpec())
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(options.shardings, everywhere),
        compiler_options=overlap_options(options.mesh) if options.overlap else None,
    )


def _at_step(opt_state: optax.OptState, step: jax.Array) -> optax.OptState:
    """The optimizer's state with its schedules, which count updates, at the run's step."""

    def is_schedule(part):
        return isinstance(part, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda part: part._replace(count=step) if is_schedule(part) else part,
        opt_state,
        is_leaf=is_schedule,
    )


def _placed(grads: tree.Tree, options: StepOptions) -> tree.Tree:
    """Gradients where their parameters are: each device keeps the part that it will update."""
    if options.shardings is None:
        return grads
    return jax.lax.with_sharding_constraint(grads, options.shardings.params)


def _grads(loss_fn, params, frozen, batch, key, options) -> tuple[tree.Tree, Metrics]:
    slots, of_slots = params, loss_fn
    if options.grad_dtype is not None:
        slots = narrow.slots(params, options.grad_dtype)

        def of_slots(slots, *rest):
            return loss_fn(narrow.narrowed(params, slots), *rest)

    (loss, metrics), grads = jax.value_and_grad(of_slots, has_aux=True)(slots, frozen, batch, key)
    metrics = {WEIGHT: jnp.ones(()), **metrics, "loss": loss}
    return grads, jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), metrics)


def _accumulate(loss_fn, params, frozen, batch, key, options) -> tuple[tree.Tree, Metrics]:
    """Scans microbatches; sums of weighted gradients, divided at the end; metrics in float32.

    Until a token counts, microbatches weigh the same; the first that has one takes their place.
    """
    num, dtype = options.accumulation, options.accumulation_dtype
    micro = jax.tree.map(lambda x: x.reshape(num, -1, *x.shape[1:]), batch)
    if options.mesh is not None:
        rows = NamedSharding(options.mesh, PartitionSpec(None, TOKEN_AXES))
        micro = jax.lax.with_sharding_constraint(micro, rows)

    def one(batch, index, counted):
        key_of = jax.random.fold_in(key, index)
        grads, metrics = _grads(loss_fn, params, frozen, batch, key_of, options)
        weight = jnp.where((counted == 0) & (metrics[WEIGHT] == 0), 1.0, metrics[WEIGHT])
        grads = jax.tree.map(lambda g: (weight * g.astype(jnp.float32)).astype(dtype), grads)
        return _placed(grads, options), {
            k: m if is_sum(k) else weight * m for k, m in metrics.items()
        }

    def body(total, xs):
        (grads, sums), counted = total, total[1][WEIGHT]
        part, index = xs
        more_grads, more = one(part, index, counted)
        anew = (counted == 0) & (more[WEIGHT] > 0)

        def add(sum_, new):
            return jnp.where(anew, jnp.zeros_like(sum_), sum_) + new

        sums = {k: (jnp.add if is_sum(k) else add)(m, more[k]) for k, m in sums.items()}
        return (jax.tree.map(add, grads, more_grads), sums), None

    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(one, first, jnp.zeros((), jnp.int32), jnp.zeros(()))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (grads, sums), _ = jax.lax.scan(body, zeros, (micro, jnp.arange(num)))
    weight = jnp.where(sums[WEIGHT] > 0, sums[WEIGHT], num)
    grads = jax.tree.map(
        lambda g, p: (g.astype(jnp.float32) / weight).astype(p.dtype), grads, params
    )
    return grads, {k: m if is_sum(k) else m / weight for k, m in sums.items()}
