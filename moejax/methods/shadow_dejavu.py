"""DejaVu's predictors, the baseline: two per layer, each reading that layer's own input.

arXiv 2310.17157 and its code (github.com/FMInference/DejaVu): Linear(D, hidden) - Linear(hidden,
out) without biases or anything between; labels per token, of neurons those that fire, of heads the
0.3 with the largest norm; binary cross-entropy weighted w = y (1 - q) + q, q the share of positive
labels of the layer (of neurons + 0.005); AdamW, weight decay 0.01, 20 epochs, learning rates 1e-4
(heads) and 1e-3 (neurons). A gated neuron never is exactly 0: there the 0.3 with the largest
activation count as firing. Published on 400,000 tokens in batches of 1024; `DejavuConfig` cuts the
batch to what a study's tokens are.

Published, every token decides anew, by the inputs that it has in the pruned model: `deciding`. The
predictors of a layer run one block ahead there, which hides their time and costs quality; here they
read the layer itself. `predict` is what all other masks here are: decided once, by the inputs of
the prompt's last token. A block's score is the sum of its neurons' probabilities.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax.methods.shadow_mask import Mask, Sizes
from moejax.models.config import ModelConfig
from moejax.models.inserted import Inserted, OnPlace
from moejax.models.masked import by_run, is_masked

TOP_SHARE = 0.3
RATES = {"heads": 1e-4, "neurons": 1e-3}
INPUT = {"heads": "attn_in", "neurons": "mlp_in"}


@dataclasses.dataclass(frozen=True)
class DejavuConfig:
    """hidden: width of every predictor. lr_scale: of the published learning rates."""

    hidden: int = 1000
    epochs: int = 20
    batch_size: int = 256
    weight_decay: float = 0.01
    lr_scale: float = 1.0
    seed: int = 0


def hidden_within(num_params: int, num_layers: int, d_model: int, num_outputs: int) -> int:
    """Width of every predictor where all of them have at most so many parameters; at least 1.

    num_outputs: heads and neurons of a layer.
    """
    return max(1, num_params // (num_layers * (2 * d_model + num_outputs)))


def fires(config: ModelConfig) -> bool:
    """Whether neurons that do not fire are exactly 0: those of ReLU without a gate."""
    return not config.gated and config.activation == "relu"


def labels(values_RU: np.ndarray, zeros: bool) -> np.ndarray:
    """bool: which units a token uses: of units with `zeros` those above, or the TOP_SHARE largest
    of each row."""
    if zeros:
        return values_RU > 0
    keep = max(1, round(TOP_SHARE * values_RU.shape[-1]))
    least = np.partition(values_RU, -keep, axis=-1)[..., -keep, None]
    return values_RU >= least


def fit(
    inputs_LRD: np.ndarray,
    labels_LRU: np.ndarray,
    part: str,
    config: DejavuConfig,
    progress: Callable[[int, float, Any], None] = lambda epoch, loss, params: None,
) -> dict[str, np.ndarray]:
    """Trains one predictor per layer, all at once; {"w_1" [L, D, hidden], "w_2" [L, hidden, U]}.

    progress: called after every epoch with its number, its mean loss and the parameters.
    """
    num_layers, num_rows, d_model = inputs_LRD.shape
    keys = jax.random.split(jax.random.key(config.seed))
    shapes = (num_layers, d_model, config.hidden), (num_layers, config.hidden, labels_LRU.shape[-1])
    params = {
        name: jax.random.uniform(key, shape, minval=-1.0) / shape[1] ** 0.5
        for name, key, shape in zip(("w_1", "w_2"), keys, shapes, strict=True)
    }
    share_L = _positive(labels_LRU, part)
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
        progress(epoch, float(np.mean(losses)), params)
    return {name: np.asarray(w) for name, w in params.items()}


def loss_of(params: Any, inputs_LRD: np.ndarray, labels_LRU: np.ndarray, part: str) -> float:
    """The loss that `fit` lowers, of other rows."""
    share_L, losses = _positive(labels_LRU, part), []
    for start in range(0, labels_LRU.shape[1], 512):
        at = slice(start, start + 512)
        piece = inputs_LRD[:, at].astype(np.float32), labels_LRU[:, at].astype(np.float32)
        losses.append(piece[1].shape[1] * float(_LOSS(params, piece, share_L)))
    return sum(losses) / labels_LRU.shape[1]


def _positive(labels_LRU: np.ndarray, part: str) -> np.ndarray:
    """The share of positive labels of each layer, as the loss weighs with it."""
    where = jnp if isinstance(labels_LRU, jax.Array) else np
    each = (labels_LRU[layer] for layer in range(len(labels_LRU)))  # not all are copied at once
    share = [int(where.count_nonzero(of_layer)) / of_layer.size for of_layer in each]
    return np.array(share, np.float32) + np.float32(0.005 if part == "neurons" else 0)


@functools.lru_cache(maxsize=8)
def _optimizer(lr: float, weight_decay: float):
    return optax.adamw(lr, weight_decay=weight_decay)


def _loss(params, batch, share_L) -> jax.Array:
    inputs_LRD, y = batch
    share = share_L[:, None, None]
    logits = jnp.einsum("lrd,ldk->lrk", inputs_LRD, params["w_1"])
    logits = jnp.einsum("lrk,lku->lru", logits, params["w_2"])
    weight = y * (1 - share) + share
    return jnp.mean(weight * optax.sigmoid_binary_cross_entropy(logits, y))


_LOSS = jax.jit(_loss)


@functools.partial(jax.jit, static_argnames=("optimizer",), donate_argnums=(0, 1))
def _step(params, state, batch, share_L, optimizer):
    value, grads = jax.value_and_grad(_loss)(params, batch, share_L)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def predict(
    params: dict[str, dict[str, Any]], inputs: dict[str, Any], order_LF: Any, sizes: Sizes
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


def kept(sizes: Sizes, sparsity: tuple[float, float]) -> dict[str, int]:
    """How many heads and blocks of a layer are kept, as `deciding` takes them."""
    return dict(zip(("heads", "neurons"), sizes.kept(sparsity), strict=True))


def in_layers(
    params: dict[str, dict[str, Any]], order_LF: Any, sizes: Sizes
) -> tuple[dict[str, Any], ...]:
    """What a laid out layer asks, from `sizes.first` on (`shadow_decode.Asking`).

    params: as `fit` gives them per part. order_LF: the order that the model's neurons are in.
    """
    index_LF, found = in_order(order_LF, sizes), []
    for layer in range(sizes.first, sizes.num_layers):
        mine = {part: {n: jnp.asarray(w[layer]) for n, w in params[part].items()} for part in INPUT}
        neurons = mine["neurons"]
        neurons["w_2"] = jnp.take(neurons["w_2"], index_LF[layer], axis=-1)
        found.append(mine)
    return tuple(found)


def deciding(
    params: dict[str, dict[str, Any]],
    config: ModelConfig,
    index_LF: Any,
    sizes: Sizes,
    keep: Mapping[str, Any],
) -> Inserted:
    """What `transformer.forward(inserted=)` takes to decide at every token, as published.

    params: as `fit` gives them per part. index_LF: `in_order` of the order that the model's neurons
    are in. keep: how many heads and neurons a token keeps of every layer from `sizes.first` on, in
    units of `sizes` (`kept`).
    """
    part_L: dict[str, Any] = {"heads": params["heads"]}
    part_L |= {"neurons": params["neurons"] | {"index": index_LF}}
    part_L |= {"pruned": jnp.arange(sizes.num_layers) >= sizes.first}
    layers = by_run(config, part_L)
    for run in config.runs:
        if not is_masked(config, run):
            del layers[run.name]["neurons"]
    units = {"heads": sizes.heads, "neurons": sizes.blocks}
    return _Deciding(layers=layers, units=units, keep=keep)


@dataclasses.dataclass(frozen=True)
class _Deciding(Inserted):
    """units: of a layer, "heads" and "neurons". keep: how many of them a token keeps."""

    units: Mapping[str, int] = dataclasses.field(default_factory=dict)
    keep: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def inside(self, part: Any) -> tuple[Callable[[str], OnPlace | None], dict[str, Any]]:
        """What enters a layer decides what the layer computes: one remembers it for the other."""
        chosen: dict[str, jax.Array] = {}

        def decide(of: str, x_BTD: jax.Array) -> jax.Array:
            if of in part:
                index = part[of].get("index")
                scores = _probabilities(part[of], x_BTD)
                scores = scores if index is None else jnp.take(scores, index, axis=-1)
                mask = _largest(scores, self.units[of], self.keep[of])
                chosen[of] = jnp.where(part["pruned"], mask, True)
            return x_BTD

        def apply(of: str, x: jax.Array) -> jax.Array:
            if of not in chosen:
                return x
            shape = x.shape[:-1] if of == "heads" else x.shape
            mask = chosen[of].reshape(shape)
            return jnp.where(mask[..., None] if of == "heads" else mask, x, 0)

        places = {"attn_in": (decide, "heads"), "heads": (apply, "heads")}
        places |= {"mlp_in": (decide, "neurons"), "neurons": (apply, "neurons")}
        table = {place: functools.partial(fn, of) for place, (fn, of) in places.items()}
        return table.get, {}


def _probabilities(params: dict[str, Any], x: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(x @ params["w_1"] @ params["w_2"])


def _largest(scores: jax.Array, num_units: int, keep: Any) -> jax.Array:
    """bool like the scores [..., U]: those in the `keep` units with the largest sums."""
    units = scores.reshape(*scores.shape[:-1], num_units, -1).sum(-1)
    return jnp.repeat(units >= _nth(units, keep), scores.shape[-1] // num_units, axis=-1)


def _nth(x: jax.Array, n: Any) -> jax.Array:
    """The n-th largest of the last dim, which stays as 1, of numbers that are not negative.

    Their bits are in the order of their values, so 31 bisections find it exactly: four times faster
    than XLA sorts rows of 1,536 on a CPU.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)

    def halve(_, ends):
        low, high = ends
        middle = low + (high - low + 1) // 2
        enough = jnp.sum(bits >= middle, axis=-1, keepdims=True) >= n
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low = jnp.zeros((*x.shape[:-1], 1), jnp.int32)
    found, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, 0x7F7FFFFF)))
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def in_blocks(neurons_LF: Any, order_LF: Any, sizes: Sizes) -> Any:
    """Sums over blocks of neurons' scores [..., L, F], in the order of `shadow_order`."""
    where = jnp if isinstance(neurons_LF, jax.Array) else np
    index = np.broadcast_to(in_order(order_LF, sizes), neurons_LF.shape)
    moved = where.take_along_axis(neurons_LF, index, axis=-1)
    return moved.reshape(*moved.shape[:-1], sizes.blocks, sizes.block).sum(-1)


def in_order(order_LF: Any, sizes: Sizes) -> np.ndarray:
    """[L, F], of experts [L, E * F]: where in the model as it came each neuron of the order is."""
    order = np.asarray(order_LF).reshape(sizes.num_layers, -1)
    width = np.asarray(order_LF).shape[-1]
    first = (np.arange(order.shape[-1]) // width * width).astype(order.dtype)  # of each expert
    return order + first
