"""What a training step will need in memory, before any array exists."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moejax.core import tree
from moejax.train.step import LossFn


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes, by what holds them; `total` estimates the peak.

    params, frozen: at rest. opt_state: the optimizer's. grads: one gradient, and with accumulation
    the sum beside it, in its dtype. activations: what the forward pass of one microbatch keeps for
    the backward pass, as traced. updates: float32, one per trained parameter.
    """

    params: int
    frozen: int
    grads: int
    opt_state: int
    activations: int
    updates: int

    @property
    def total(self) -> int:
        """What is always there, and the larger of activations and updates: those follow them."""
        at_rest = self.params + self.frozen + self.grads + self.opt_state
        return at_rest + max(self.activations, self.updates)


def step_memory(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    trainable: tree.Tree,
    frozen: tree.Tree,
    batch: Any,
    accumulation: int = 1,
    accumulation_dtype: str = "float32",
) -> StepMemory:
    """Traces one microbatch's loss on shapes alone; arguments may be arrays or abstract."""
    trainable, frozen = tree.abstract(trainable), tree.abstract(frozen)
    micro = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] // accumulation, *x.shape[1:]), x.dtype), batch
    )

    def residuals(trainable, frozen, batch):
        loss, backward, _ = jax.vjp(
            lambda p: loss_fn(p, frozen, batch, jax.random.key(0)), trainable, has_aux=True
        )
        return loss, jax.tree.leaves(backward)

    _, kept = jax.eval_shape(residuals, trainable, frozen, micro)
    arrays = [leaf for leaf in kept if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    # Parameters are residuals too, and counted already.
    held = Counter((p.shape, p.dtype) for p in jax.tree.leaves((trainable, frozen)))
    activations = 0
    for leaf in arrays:
        held[leaf.shape, leaf.dtype] -= 1
        if held[leaf.shape, leaf.dtype] < 0:
            activations += tree.num_bytes(leaf)
    updates = 4 * tree.num_params(trainable)
    sums = jnp.dtype(accumulation_dtype).itemsize * tree.num_params(trainable)
    return StepMemory(
        params=tree.num_bytes(trainable),
        frozen=tree.num_bytes(frozen),
        grads=tree.num_bytes(trainable) + (sums if accumulation > 1 else 0),
        opt_state=tree.num_bytes(jax.eval_shape(optimizer.init, trainable)),
        activations=activations,
        updates=updates,
    )
