"""DejaVu's predictors, the baseline: two per layer, each reading that layer's own input.

arXiv 2310.17157 and its code (github.com/FMInference/DejaVu): Linear(D, hidden) - Linear(hidden,
out) without biases or anything between; labels per token, of neurons those that fire, of heads the
0.3 with the largest norm; binary cross-entropy weighted w = y (1 - q) + q, q the share of positive
labels of the layer (of neurons + 0.005); AdamW, weight decay 0.01, 20 epochs, learning rates 1e-4
(heads) and 1e-3 (neurons). A gated neuron never is exactly 0: there the 0.3 with the largest
activation count as firing. Published on 400,000 tokens, of which a study here has a few thousand;
its batch of 1024 is cut accordingly. Published ones also decide anew for every token, here once, by
the prompt, as all that they are compared with.

At use every layer's input at the prompt's last token gives one probability per head and neuron; a
block's score is the sum of its neurons'.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax.methods.shadow_mask import Mask, Sizes

TOP_SHARE = 0.3
RATES = {"heads": 1e-4, "neurons": 1e-3}
INPUT = {"heads": "attn_in", "neurons": "mlp_in"}


@dataclasses.dataclass(frozen=True)
class DejavuConfig:
    """hidden: width of every predictor. lr_scale: of the published learning rates."""

    hidden: int = 1000
    epochs: int = 20
    batch_size: int = 128
    weight_decay: float = 0.01
    lr_scale: float = 1.0
    seed: int = 0


def hidden_within(num_params: int, num_layers: int, d_model: int, num_outputs: int) -> int:
    """Width of every predictor where all of them have at most so many parameters; at least 1.

    num_outputs: heads and neurons of a layer.
    """
    return max(1, num_params // (num_layers * (2 * d_model + num_outputs)))


def labels(values_RU: np.ndarray, fires: bool) -> np.ndarray:
    """bool: which units a token uses: those above 0, or the TOP_SHARE largest of each row."""
    if fires:
        return values_RU > 0
    keep = max(1, round(TOP_SHARE * values_RU.shape[-1]))
    least = np.partition(values_RU, -keep, axis=-1)[..., -keep, None]
    return values_RU >= least


def fit(
    inputs_LRD: np.ndarray,
    labels_LRU: np.ndarray,
    part: str,
    config: DejavuConfig,
    progress: Callable[[int, float], None] = lambda epoch, loss: None,
) -> dict[str, np.ndarray]:
    """Trains one predictor per layer, all at once; {"w_1" [L, D, hidden], "w_2" [L, hidden, U]}."""
    num_layers, num_rows, d_model = inputs_LRD.shape
    keys = jax.random.split(jax.random.key(config.seed))
    shapes = (num_layers, d_model, config.hidden), (num_layers, config.hidden, labels_LRU.shape[-1])
    params = {
        name: jax.random.uniform(key, shape, minval=-1.0) / shape[1] ** 0.5
        for name, key, shape in zip(("w_1", "w_2"), keys, shapes, strict=True)
    }
    more = 0.005 if part == "neurons" else 0.0
    share_L = labels_LRU.mean((1, 2)).astype(np.float32) + more
    optimizer = _optimizer(RATES[part] * config.lr_scale, config.weight_decay)
    state = optimizer.init(params)
    batch_size = min(config.batch_size, num_rows)
    draw = np.random.default_rng(config.seed)
    for epoch in range(config.epochs):
        mixed, losses = draw.permutation(num_rows), []
        for start in range(0, num_rows // batch_size * batch_size, batch_size):
            at = np.sort(mixed[start : start + batch_size])
            piece = inputs_LRD[:, at].astype(np.float32), labels_LRU[:, at].astype(np.float32)
            params, state, loss = _step(params, state, piece, share_L, optimizer)
            losses.append(float(loss))
        progress(epoch, float(np.mean(losses)))
    return {name: np.asarray(w) for name, w in params.items()}


@functools.lru_cache(maxsize=8)
def _optimizer(lr: float, weight_decay: float):
    return optax.adamw(lr, weight_decay=weight_decay)


@functools.partial(jax.jit, static_argnames=("optimizer",), donate_argnums=(0, 1))
def _step(params, state, batch, share_L, optimizer):
    inputs_LRD, y = batch
    share = share_L[:, None, None]

    def loss(params):
        logits = jnp.einsum("lrd,ldk->lrk", inputs_LRD, params["w_1"])
        logits = jnp.einsum("lrk,lku->lru", logits, params["w_2"])
        weight = y * (1 - share) + share
        return jnp.mean(weight * optax.sigmoid_binary_cross_entropy(logits, y))

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def predict(
    params: dict[str, dict[str, Any]], inputs: dict[str, jax.Array], order_LF: Any, sizes: Sizes
) -> Mask:
    """Scores [B, L, heads] and [B, L, blocks].

    params: per part as `fit` gives them. inputs: "attn_in" and "mlp_in" [L, B, D]. order_LF: the
    order of neurons in which blocks are cut (the network's outputs are in the model's own).
    """

    def out(part: str) -> jax.Array:
        x = jnp.einsum("lbd,ldk->blk", inputs[INPUT[part]], params[part]["w_1"])
        return jax.nn.sigmoid(jnp.einsum("blk,lku->blu", x, params[part]["w_2"]))

    heads = out("heads")
    heads = heads.reshape(*heads.shape[:-1], sizes.heads, -1).sum(-1)
    return Mask(heads, in_blocks(out("neurons"), order_LF, sizes))


def in_blocks(neurons_LF: Any, order_LF: Any, sizes: Sizes) -> Any:
    """Sums over blocks of neurons' scores [..., L, F], in the order of `shadow_order`."""
    order = np.asarray(order_LF).reshape(sizes.num_layers, -1)
    width = np.asarray(order_LF).shape[-1]
    first = (np.arange(order.shape[-1]) // width * width).astype(order.dtype)  # of each expert
    where = jnp if isinstance(neurons_LF, jax.Array) else np
    index = np.broadcast_to(order + first, neurons_LF.shape)
    moved = where.take_along_axis(neurons_LF, index, axis=-1)
    return moved.reshape(*moved.shape[:-1], sizes.blocks, sizes.block).sum(-1)
