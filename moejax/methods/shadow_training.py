"""Training of the unified predictor (`moejax.methods.shadow_predictor`) on collected scores."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax.core.errors import InputError
from moejax.methods import shadow_predictor
from moejax.methods.shadow_mask import Mask, Sizes


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """AdamW with a cosine to 0, as published: 100 epochs at 1e-3 there.

    best: keep the weights of the epoch with the least loss on a tenth of the texts, which are not
    trained on. rows: examples of each text, side by side.
    """

    hidden: int
    epochs: int = 60
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0
    best: bool = True
    rows: int = 1


def scaled(scores_NLU: np.ndarray, variant: str) -> np.ndarray:
    """Targets: min-max of each text over all layers ("unified"), or of each of its layers.

    The second is the reference's "predictorL", with which it got its headline figures: no layer
    then counts more for having larger scores. Of "token" they are shares already: 1 for a head that
    the token uses (`shadow_dejavu.labels`), for a block the share of its neurons.
    """
    if variant == "token":
        return np.asarray(scores_NLU, np.float32)
    dims = (1, 2) if variant == "unified" else (2,)
    low = scores_NLU.min(dims, keepdims=True)
    high = scores_NLU.max(dims, keepdims=True)
    return ((scores_NLU - low) / np.maximum(high - low, 1e-30)).astype(np.float32)


def fit(
    context_NE: np.ndarray,
    scores: Mask,
    sizes: Sizes,
    variant: str,
    config: FitConfig,
    progress: Callable[[int, float, float], None] = lambda epoch, loss, held: None,
) -> dict[str, np.ndarray]:
    """Trains the network of one variant; returns its parameters.

    context_NE: layer 0's context of N texts, as it is. scores: [N, L, heads] and [N, L, blocks].
    The loss is the mean squared error of both parts, each over its variance, so that neither
    drowns. Inputs are standardised while training and that is folded into W_in and b_in at the end,
    so the network that is saved reads what the paper's does. InputError: fewer than 4 texts.
    """
    if variant not in shadow_predictor.OF_FIRST_LAYER:
        known = ", ".join(shadow_predictor.OF_FIRST_LAYER)
        raise InputError(f"predictor variant {variant!r} is unknown: use {known}")
    targets = {name: scaled(np.asarray(getattr(scores, name)), variant) for name in _PARTS}
    usable = np.isfinite(context_NE).all(1)
    for part in targets.values():
        usable &= np.isfinite(part).all((1, 2))
    if usable.sum() < 4:
        raise InputError(f"{usable.sum()} texts with finite scores: a predictor needs 4 at least")
    inputs = np.asarray(shadow_predictor.normalised(jnp.asarray(context_NE[usable])))
    targets = {name: part[usable] for name, part in targets.items()}
    mean, std = inputs.mean(0), inputs.std(0) + 1e-3
    inputs = (inputs - mean) / std
    held, train = _parted(np.flatnonzero(usable) // config.rows, config.seed)
    static = Mask(*(targets[name][train].mean(0) for name in _PARTS))
    key = jax.random.key(config.seed)
    params = shadow_predictor.init(key, inputs.shape[1], config.hidden, static)
    spread = {n: float(np.mean((targets[n] - targets[n][train].mean(0)) ** 2)) for n in _PARTS}
    scale = tuple(1 / max(spread[name], 1e-12) for name in _PARTS)
    batch_size = min(config.batch_size, len(train))
    per_epoch = len(train) // batch_size
    optimizer = _optimizer(config.lr, config.weight_decay, config.epochs * per_epoch)
    state = optimizer.init(params)

    def batch(at):
        return inputs[at], {name: targets[name][at] for name in _PARTS}

    best, least = params, float(_loss(params, batch(held), sizes, scale))
    draw = np.random.default_rng([config.seed, 1])
    for epoch in range(config.epochs):
        mixed, total = draw.permutation(train), 0.0
        for start in range(0, per_epoch * batch_size, batch_size):
            piece = batch(mixed[start : start + batch_size])
            params, state, loss = _step(params, state, piece, (sizes, scale, optimizer))
            total += float(loss) / per_epoch
        now = float(_loss(params, batch(held), sizes, scale))
        progress(epoch, total, now)
        if now < least or not config.best:
            best, least = params, now
    found = {name: np.asarray(w, np.float32) for name, w in best.items()}
    found["w_in"] = found["w_in"] / std[:, None]
    found["b_in"] = found["b_in"] - mean @ found["w_in"]
    return found


_PARTS = ("heads", "blocks")


def _parted(texts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Examples of a tenth of the texts, and all others, by each example's text, which ascend."""
    rows = np.split(np.arange(len(texts)), np.flatnonzero(np.diff(texts)) + 1)
    order = np.random.default_rng(seed).permutation(len(rows))
    first = max(1, len(order) // 10)
    held, train = order[:first], order[first:]
    return np.concatenate([rows[i] for i in held]), np.concatenate([rows[i] for i in train])


@functools.lru_cache(maxsize=8)
def _optimizer(lr: float, weight_decay: float, steps: int):
    return optax.adamw(optax.cosine_decay_schedule(lr, max(1, steps)), weight_decay=weight_decay)


@functools.partial(jax.jit, static_argnames=("sizes", "scale"))
def _loss(params, batch, sizes: Sizes, scale) -> Any:
    """Mean over parts of the squared error over its variance about the static mean: 1 at first."""
    inputs, targets = batch
    hidden = jax.nn.relu(inputs @ params["w_in"] + params["b_in"])
    total = 0.0
    for name, factor in zip(_PARTS, scale, strict=True):
        y = hidden @ params[f"w_out_{name}"] + params[f"b_out_{name}"]
        y = y.reshape(-1, sizes.num_layers, getattr(sizes, name))
        total += factor * jnp.mean(jnp.square(y - targets[name])) / len(_PARTS)
    return total


@functools.partial(jax.jit, static_argnames=("rest",))
def _step(params, state, batch, rest):
    sizes, scale, optimizer = rest
    loss, grads = jax.value_and_grad(_loss)(params, batch, sizes, scale)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss
