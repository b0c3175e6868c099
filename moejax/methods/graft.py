"""LLM Modules: a frozen source model lends its states to a target model (arXiv 2502.08213).

The source reads a text once and is never differentiated; the target reads the same text, and
Enhanced Cross-Attention layers of a bridge bring the source's states r into its residual stream x:

    c = W_o softmax(q(LN x) k(LN r) / sqrt(C) + bias) v(LN r)      over the states in sight
    a = c + LN(W_2 gelu(W_1 c))                                    a bottleneck adapter
    g = tanh(W_g [x; a]), started at 0   or   sigmoid(W_g [x; a] + b_g)
    x <- x + g * a                                             nothing where none is in sight

Which states target token t sees is a number per token, `limit_BT` (`moejax.data.alignment`): with
one tokenizer t + 1. "paper" is the architecture of the reference as it is, for comparison: two
layers before the target's blocks in place of its token embeddings, g a + (1 - g) x added to x, and
every token sees all states, later ones too, which no generation can have.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.ops.cross_attention import NUM_BUCKETS, attention_weights, cross_attention, recency
from moejax.ops.norm import layer_norm

PLACEMENTS = ("before", "inside", "paper")
GATES = ("channel", "token", "scalar")
STARTS = ("tanh", "zero_output", "sigmoid")
EPS = 1e-5
LAST = -1  # the tap that is the source's final state, after its norm


@dataclasses.dataclass(frozen=True)
class GraftConfig:
    """A bridge from one source.

    Attributes:
      source_size, target_size: D of the two models.
      placement: "before" the target's blocks, "inside" (after every `every`-th block), "paper".
      every: blocks per layer of the bridge (inside). num_before: layers before the blocks.
      taps: source layers whose states are read, by number of the block they come out of, from 0;
        -1 is the final state after its norm. Several are concatenated.
      num_heads: of the cross-attention, of size target_size / num_heads.
      bottleneck: width of the adapter.
      gate: "channel", "token" (one number per token) or "scalar" (one per layer).
      start: "tanh" (gate closed), "zero_output" (sigmoid gate, adapter and W_o start at 0): both
        leave the target as it is at step 0; "sigmoid" starts about half open.
      distance_bias: learned bias per head and distance to the newest state in sight; starts so
        that the first heads read the newest states and the last ones all (`recency`). Without
        it attention starts uniform, and a state says most about the token after its own.
    """

    source_size: int
    target_size: int
    placement: str = "inside"
    every: int = 4
    num_before: int = 2
    taps: tuple[int, ...] = (LAST,)
    num_heads: int = 8
    bottleneck: int = 256
    gate: str = "channel"
    start: str = "tanh"
    distance_bias: bool = True

    def __post_init__(self):
        for name, known in (("placement", PLACEMENTS), ("gate", GATES), ("start", STARTS)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name}={getattr(self, name)!r} is unknown: use {', '.join(known)}"
                )
        sizes = ("source_size", "target_size", "every", "num_before", "num_heads", "bottleneck")
        for name in sizes:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.target_size % self.num_heads:
            raise InputError(
                f"{self.num_heads} heads do not divide the target's size {self.target_size}"
            )
        if not self.taps or len(set(self.taps)) != len(self.taps):
            raise InputError(f"taps={self.taps}: name at least one source layer, each once")
        if self.placement == "paper" and (self.gate, self.start) != ("channel", "sigmoid"):
            raise InputError("placement 'paper' has gate 'channel' and start 'sigmoid'")
        if self.placement == "paper" and (self.taps != (LAST,) or self.distance_bias):
            raise InputError("placement 'paper' reads the last state, without a distance bias")

    @classmethod
    def paper(cls, source_size: int, target_size: int) -> GraftConfig:
        """The reference's architecture: 8 heads, bottleneck 256, two layers."""
        return cls(source_size, target_size, "paper", start="sigmoid", distance_bias=False)

    @property
    def read_size(self) -> int:
        """Size of what the bridge reads per source token: all taps side by side."""
        return self.source_size * len(self.taps)

    def num_layers(self, target: ModelConfig) -> int:
        """Layers of the bridge in this target; InputError where none would be."""
        if self.placement != "inside":
            return self.num_before
        if self.every > target.num_layers:
            raise InputError(
                f"every={self.every} is more than the target's {target.num_layers} layers: lower it"
            )
        return target.num_layers // self.every


def check_fits(graft: GraftConfig, source: ModelConfig, target: ModelConfig) -> None:
    """Raises InputError unless the bridge joins these two models."""
    for name, model, size in (
        ("source", source, graft.source_size),
        ("target", target, graft.target_size),
    ):
        if model.d_model != size:
            raise InputError(
                f"the bridge is for a {name} of size {size}, and this one's is {model.d_model}"
            )
    for tap in graft.taps:
        if not LAST <= tap < source.num_layers:
            raise InputError(
                f"the source has no layer {tap}: it has 0 to {source.num_layers - 1}, and -1 is "
                "its final state"
            )
    graft.num_layers(target)


# -- parameters ------------------------------------------------------------------------------------


def bridge_shapes(graft: GraftConfig, target: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape; the layers' leaves are stacked."""
    d, r, num = graft.target_size, graft.read_size, graft.num_layers(target)
    h, c, n = graft.num_heads, graft.target_size // graft.num_heads, graft.bottleneck
    width = {"channel": d, "token": 1, "scalar": 0}[graft.gate]
    layer: dict[str, tuple[int, ...]] = {
        "x_norm/scale": (d,),
        "x_norm/bias": (d,),
        "r_norm/scale": (r,),
        "r_norm/bias": (r,),
        "w_q": (d, h, c),
        "b_q": (h, c),
        "w_k": (r, h, c),
        "b_k": (h, c),
        "w_v": (r, h, c),
        "b_v": (h, c),
        "w_o": (h, c, d),
        "b_o": (d,),
        "w_in": (d, n),
        "b_in": (n,),
        "w_out": (n, d),
        "b_out": (d,),
        "a_norm/scale": (d,),
        "a_norm/bias": (d,),
        "b_gate": (max(width, 1),),
    }
    if width:
        layer["w_gate"] = (2 * d, width)
    if graft.distance_bias:
        layer["distance"] = (h, NUM_BUCKETS)
    shapes = {f"layers/{path}": (num, *shape) for path, shape in layer.items()}
    if graft.placement == "paper":
        middle = (r + d) // 2
        shapes |= {
            "pre/w": (r, r),
            "pre/b": (r,),
            "skip/w": (r, d),
            "skip/b": (d,),
            "first/w_in": (r, middle),
            "first/b_in": (middle,),
            "first/norm/scale": (middle,),
            "first/norm/bias": (middle,),
            "first/w_out": (middle, d),
            "first/b_out": (d,),
            "first/out_norm/scale": (d,),
            "first/out_norm/bias": (d,),
        }
    return shapes


def init_bridge(key: jax.Array, graft: GraftConfig, target: ModelConfig) -> tree.Tree:
    """Normal weights of variance 1 / inputs, ones and zeros for norms and biases; start's zeros."""
    params = {}
    for index, (path, shape) in enumerate(sorted(bridge_shapes(graft, target).items())):
        name = path.rsplit("/", 1)[-1]
        stacked = 1 if path.startswith("layers/") else 0
        if name == "scale":
            params[path] = jnp.ones(shape)
        elif name == "distance":
            params[path] = jnp.broadcast_to(recency(graft.num_heads), shape)
        elif name.startswith("b") or _starts_at_zero(graft, path):
            params[path] = jnp.zeros(shape)
        else:
            own = shape[stacked:]
            inputs = math.prod(own[:-1]) if name == "w_o" else own[0]
            noise = jax.random.normal(jax.random.fold_in(key, index), shape)
            params[path] = noise * inputs**-0.5
    return tree.unflatten(params)


def _starts_at_zero(graft: GraftConfig, path: str) -> bool:
    zeros = {"tanh": ("layers/w_gate",), "zero_output": ("layers/w_o", "layers/w_out")}
    return path in zeros.get(graft.start, ())


# -- one layer -------------------------------------------------------------------------------------


def read(bridge: tree.Tree, graft: GraftConfig, states_BSR: jax.Array) -> jax.Array:
    """What the layers read of states [B, S, read_size]: themselves, or `pre` of them (paper)."""
    if graft.placement != "paper":
        return states_BSR
    return states_BSR @ _as(bridge["pre"]["w"], states_BSR) + _as(bridge["pre"]["b"], states_BSR)


def keys_values(bridge: tree.Tree, r_BSR: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of all layers of the bridge, each [M, B, H, S, C]: what a cache keeps."""

    def one(layer):
        normed = _norm(layer["r_norm"], r_BSR)
        return tuple(
            jnp.einsum("bsr,rhc->bhsc", normed, _as(layer[f"w_{n}"], r_BSR))
            + _as(layer[f"b_{n}"], r_BSR)[:, None]
            for n in ("k", "v")
        )

    return jax.vmap(one)(bridge["layers"])


@dataclasses.dataclass(frozen=True)
class Look:
    """What a layer did, for people: c, a, gate [B, T, D or 1], weights [B, H, T, S]."""

    mixed_BTD: jax.Array
    adapted_BTD: jax.Array
    gate: jax.Array
    weights_BHTS: jax.Array


def enhance(
    layer: tree.Tree,
    graft: GraftConfig,
    x_BTD: jax.Array,
    keys_values: tuple[jax.Array, jax.Array],
    limit_BT: jax.Array,
) -> jax.Array:
    """What one Enhanced Cross-Attention layer adds to x, [B, T, D]."""
    q_BTHC, bias = _queries(layer, x_BTD)
    mixed = cross_attention(q_BTHC, *keys_values, limit_BT, bias)
    return _added(layer, graft, x_BTD, mixed, limit_BT)[0]


def look(layer, graft: GraftConfig, x_BTD, keys_values, limit_BT) -> Look:
    """The same, taken apart; keeps all attention weights at once."""
    q_BTHC, bias = _queries(layer, x_BTD)
    weights = attention_weights(q_BTHC, keys_values[0], limit_BT, bias)
    mixed = jnp.einsum("bhts,bhsc->bthc", weights.astype(x_BTD.dtype), keys_values[1])
    _, c, a, g = _added(layer, graft, x_BTD, mixed, limit_BT)
    return Look(c, a, g, weights)


def _queries(layer, x_BTD):
    normed = _norm(layer["x_norm"], x_BTD)
    q = jnp.einsum("btd,dhc->bthc", normed, _as(layer["w_q"], x_BTD)) + _as(layer["b_q"], x_BTD)
    return q, layer.get("distance")


def _added(layer, graft: GraftConfig, x, mixed_BTHC, limit_BT):
    def w(name):
        return _as(layer[name], x)

    c = jnp.einsum("bthc,hcd->btd", mixed_BTHC, w("w_o")) + w("b_o")
    hidden = jax.nn.gelu(c @ w("w_in") + w("b_in"), approximate=False)
    a = c + _norm(layer["a_norm"], hidden @ w("w_out") + w("b_out"))
    gate = w("b_gate")
    if "w_gate" in layer:
        gate = gate + jnp.concatenate([x, a], -1) @ w("w_gate")
    gate = jnp.tanh(gate) if graft.start == "tanh" else jax.nn.sigmoid(gate)
    if graft.placement == "paper":
        return gate * a + (1 - gate) * x, c, a, gate
    gate = jnp.broadcast_to(gate, (*x.shape[:2], gate.shape[-1]))
    added = jnp.where((limit_BT > 0)[..., None], gate * a, 0)
    return added.astype(x.dtype), c, a, gate


def _norm(params, x):
    return layer_norm(x, EPS, params["scale"], params["bias"])


def _as(w, x):
    return w.astype(x.dtype)


# -- in the target ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a target reads of one source: its bridge, all keys and values, what is in sight.

    states_BSR: needed for "paper" only, whose input they replace. open_B: per row whether the
    source is used, 1 or 0 (switchable per request); None: by all. skip: layers of the bridge that
    add nothing, where the target's layers are walked one by one.
    """

    bridge: tree.Tree
    graft: GraftConfig
    keys_values: tuple[jax.Array, jax.Array]
    limit_BT: jax.Array
    states_BSR: jax.Array | None = None
    open_B: jax.Array | None = None
    skip: tuple[int, ...] = ()

    def layer(self, index: Any) -> tuple[tree.Tree, tuple[jax.Array, jax.Array]]:
        """Parameters, keys and values of a layer of the bridge (an int, or traced)."""

        def at(stack):
            if isinstance(index, int):
                return stack[index]
            return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)

        pair = (at(self.keys_values[0]), at(self.keys_values[1]))
        return jax.tree.map(at, self.bridge["layers"]), pair

    def added(self, index: Any, x_BTD: jax.Array) -> jax.Array:
        """What layer `index` of the bridge (an int, or traced) adds to x."""
        if isinstance(index, int) and index in self.skip:
            return jnp.zeros_like(x_BTD)
        layer, pair = self.layer(index)
        y_BTD = enhance(layer, self.graft, x_BTD, pair, self.limit_BT)
        if self.open_B is None:
            return y_BTD
        return y_BTD * self.open_B[:, None, None].astype(y_BTD.dtype)


def insert_before(readings: Mapping[str, Reading]) -> Callable[[jax.Array], jax.Array]:
    """x [B, T, D], the target's token embeddings -> what enters its first block."""

    def before(x_BTD: jax.Array) -> jax.Array:
        for reading in readings.values():
            if reading.graft.placement == "inside":
                continue
            if reading.graft.placement == "paper":
                x_BTD = _paper_input(reading, x_BTD)
                continue
            for index in range(reading.graft.num_before):
                x_BTD = x_BTD + reading.added(index, x_BTD)
        return x_BTD

    return before


def _paper_input(reading: Reading, x_BTD: jax.Array) -> jax.Array:
    """z + P of the reference: the target's own token embeddings are not used."""
    assert reading.states_BSR is not None
    bridge, r = reading.bridge, reading.states_BSR
    if r.shape[1] != x_BTD.shape[1]:
        raise InputError(
            f"placement 'paper' needs one tokenizer: {r.shape[1]} source and {x_BTD.shape[1]} "
            "target tokens"
        )
    r = read(bridge, reading.graft, r.astype(x_BTD.dtype))
    first = bridge["first"]
    z = _norm(first["norm"], r @ _as(first["w_in"], r) + _as(first["b_in"], r))
    z = jax.nn.gelu(z, approximate=False) @ _as(first["w_out"], r) + _as(first["b_out"], r)
    z = _norm(first["out_norm"], z)
    for index in range(reading.graft.num_before):
        z = z + reading.added(index, z)
    return z + r @ _as(bridge["skip"]["w"], r) + _as(bridge["skip"]["b"], r)


def insert_after(readings: Mapping[str, Reading]) -> Callable[[Any, jax.Array], jax.Array]:
    """(number of the block, x) -> x: the bridge's layers after every n-th block."""

    def after(block: Any, x_BTD: jax.Array) -> jax.Array:
        for reading in readings.values():
            if reading.graft.placement != "inside":
                continue
            every = reading.graft.every
            if isinstance(block, int):
                if (block + 1) % every == 0:
                    x_BTD = x_BTD + reading.added(block // every, x_BTD)
                continue
            num = reading.keys_values[0].shape[0]
            index = jnp.minimum(block // every, num - 1)
            x_BTD = jax.lax.cond(
                (block + 1) % every == 0,
                lambda x, reading=reading, index=index: x + reading.added(index, x),
                lambda x: x,
                x_BTD,
            )
        return x_BTD

    return after
