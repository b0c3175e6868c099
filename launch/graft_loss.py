"""What `launch.graft` trains: the bridge, or one of its rivals of equal size, and their losses.

    bridge      the target with the bridge            shuffled  with another text's states
    adapter     the target with adapters of the bridge's size and no source at all
    forward, reverse   the same, and the source's distribution (KL either way)
    gkd         the same, JSD, a share of the texts written by the student itself
    hidden      the same, and the source's final states through a projection
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from launch.graft_setup import Setup, fresh_bridge
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods import bottleneck, lora
from moejax.methods.graft import LAST, bridge_shapes
from moejax.methods.graft_forward import grafted, make_reading, source_states
from moejax.models.inserted import Inserted
from moejax.models.transformer import forward
from moejax.train.distill import state_distance, token_divergence
from moejax.train.loss import targets, token_nll

TRAINED = ("all", "lora", "none")
BRIDGED = ("bridge", "shuffled")
DISTILLED = {"forward": "forward", "reverse": "reverse", "gkd": "jsd"}
METHODS = (*BRIDGED, "adapter", *DISTILLED, "hidden")


def check_method(setup: Setup) -> None:
    """InputError for a method that these two models cannot be trained by."""
    method, target = setup.config.method, setup.config.target.train
    if target not in TRAINED:
        raise InputError(f"target.train {target!r} is unknown: use {', '.join(TRAINED)}")
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown: use {', '.join(METHODS)}")
    if method in DISTILLED or method == "hidden":
        if setup.joined.how != "same" or setup.joined.prefix:
            raise InputError(
                f"method {method!r} compares the models token by token: it needs one tokenizer "
                "and --config.bridge.alignment=same, without bridge.prefix"
            )
        if setup.graft.taps != (LAST,):
            raise InputError(f"method {method!r} reads the source's final states: source.layers -1")


def trained_parts(setup: Setup, params: tree.Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trained, frozen): bridge or adapters always, the target as target.train says."""
    check_method(setup)
    config, target = setup.config, setup.config.target
    trainable: dict[str, Any] = {}
    if config.method in BRIDGED:
        trainable["bridge"] = fresh_bridge(setup)
    else:
        key = jax.random.key(config.train.seed)
        width = adapter_width(setup)
        trainable["adapters"] = bottleneck.init_adapters(
            key, setup.target.config, adapter_every(setup), width
        )
        if config.method == "hidden":
            shape = (setup.graft.target_size, setup.graft.source_size)
            trainable["projection"] = jax.random.normal(key, shape) * shape[0] ** -0.5
    if target.train == "all":
        return trainable | {"target": params}, {}
    if target.train == "lora":
        trainable["lora"] = lora.init_adapters(params, lora_config(setup))
    return trainable, {"target": jax.device_put(params)}


def adapter_width(setup: Setup) -> int:
    """The width at which adapters have as many parameters as the bridge."""
    size = sum(_size(s) for s in bridge_shapes(setup.graft, setup.target.config).values())
    return bottleneck.equal_width(setup.target.config, adapter_every(setup), size)


def adapter_every(setup: Setup) -> int:
    """Blocks per adapter: as many as per layer of a bridge inside."""
    return min(setup.config.bridge.every, setup.target.config.num_layers)


def _size(shape) -> int:
    total = 1
    for number in shape:
        total *= number
    return total


def lora_config(setup: Setup) -> lora.LoraConfig:
    """Of target.train = "lora"."""
    rank = setup.config.target.lora_rank
    return lora.LoraConfig(rank, 2.0 * rank)


def target_of(setup: Setup, trainable: tree.Tree, frozen: tree.Tree) -> tree.Tree:
    """The target's tree as it is run."""
    if "target" in trainable:
        return trainable["target"]
    if "lora" in trainable:
        return lora.attach(trainable["lora"], frozen["target"], lora_config(setup))
    return frozen["target"]


def run_target(setup: Setup, trainable, frozen, batch, states) -> jax.Array:
    """The target's last hidden states with the bridge, or the adapters, in it."""
    params = target_of(setup, trainable, frozen)
    more: dict[str, Any] = {
        "positions_BT": batch["positions"],
        "segment_ids_BT": batch["segment_ids"],
        "options": setup.options,
    }
    if "adapters" in trainable:
        more["inserted"] = adapters_in(setup, trainable)
        return forward(params, setup.target.config, batch["tokens"], **more).hidden_BTD
    dtype = setup.options.compute_dtype
    reading = make_reading(
        trainable["bridge"], setup.graft, states, batch["limits"], compute_dtype=dtype
    )
    return grafted(
        params, setup.target.config, batch["tokens"], {"source": reading}, **more
    ).hidden_BTD


def adapters_in(setup: Setup, trainable: tree.Tree) -> Inserted | None:
    """The adapters, for the decoder; None where a bridge is trained."""
    if "adapters" not in trainable:
        return None
    return bottleneck.inserted(trainable["adapters"], adapter_every(setup))


def make_loss(setup: Setup):
    """Next-token loss of the answers, through bridge and target alone; plus distillation's own."""
    config, method = setup.target.config, setup.config.method

    def loss_fn(trainable, frozen, batch, rng):
        del rng
        states = states_of_batch(setup, frozen, batch)
        hidden = run_target(setup, trainable, frozen, batch, states)
        target = target_of(setup, trainable, frozen)
        target_BT, weight_BT = targets(batch)
        count = jnp.sum(weight_BT)
        nll_BT = token_nll(target, config, hidden, target_BT)
        nll = jnp.sum(nll_BT * weight_BT) / jnp.maximum(count, 1.0)
        tokens = jnp.sum(batch["segment_ids"] > 0)
        metrics = {"nll": nll, "target_count": count, "token_count": tokens}
        extra = _extra(setup, trainable, frozen, batch, states, hidden)
        if extra is None:
            return nll, metrics
        own = jnp.maximum(_taught(batch, weight_BT), 0)
        metrics["distance"] = jnp.sum(extra * own) / jnp.maximum(jnp.sum(own), 1.0)
        weight = 1.0 if method == "gkd" else setup.config.distill.weight
        share = 1.0 if method == "hidden" else 1.0 - weight  # KL in place of a part, states beside
        return share * nll + weight * metrics["distance"], metrics

    return loss_fn


def states_of_batch(setup: Setup, frozen, batch) -> jax.Array | None:
    """The source's states of a batch: from disk, from the source, or none for plain adapters."""
    if "states" in batch:
        return batch["states"]
    if setup.config.method == "adapter":
        return None
    return source_states(
        frozen["source"],
        setup.source.config,
        setup.graft.taps,
        batch["source_tokens"],
        options=setup.options,
    )[0]


def _extra(setup: Setup, trainable, frozen, batch, states, hidden) -> jax.Array | None:
    """Distance to the source per token [B, T], or None."""
    method = setup.config.method
    if method in DISTILLED:
        num = hidden.shape[1]
        student = (target_of(setup, trainable, frozen), setup.target.config, hidden)
        teacher = (frozen["source_head"], setup.source.config, _long(states, num))
        return token_divergence(DISTILLED[method], student, teacher, setup.config.distill.beta)
    if method == "hidden":
        return state_distance(hidden @ trainable["projection"], _long(states, hidden.shape[1]))
    return None


def _long(states: jax.Array, num: int) -> jax.Array:
    """States [B, num, R]: the source's row may be longer or shorter than the target's."""
    short = max(0, num - states.shape[1])
    return jnp.pad(states, ((0, 0), (0, short), (0, 0)))[:, :num].astype(jnp.float32)


def _taught(batch, weight_BT: jax.Array) -> jax.Array:
    """Weights of the tokens that the source reads too (not the target's own end token)."""
    limits = jnp.asarray(batch["limits"])
    grows = (limits[:, 1:] > limits[:, :-1]).astype(weight_BT.dtype)
    return weight_BT * jnp.pad(grows, ((0, 0), (0, 1)))
