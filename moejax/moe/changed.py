"""The MoE layer with a function on every expert's neurons: what masks and measures of them need."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core.errors import InputError
from moejax.moe.config import MoEConfig
from moejax.moe.layer import MoEStats, add_shared_network, layer_stats
from moejax.moe.routing import route
from moejax.moe.scores import expert_inputs
from moejax.ops.gated_ffn import Activation

OnPlace = Callable[[jax.Array], jax.Array]


def changed_moe(
    params: dict[str, Any],
    x_BTD: jax.Array,
    config: MoEConfig,
    changes: tuple[OnPlace | None, OnPlace | None],
    *,
    activation: Activation = jax.nn.silu,
    mask_BT: jax.Array | None = None,
    rng: jax.Array | None = None,
    trace: bool = False,
    parallel: Any = None,
) -> tuple[jax.Array, MoEStats]:
    """`moe_layer` by its definition, every expert on every token, with its neurons changed.

    y_n = sum_e g_ne W_down,e f(a_ne), a_ne = h(act(W_gate,e x_n)) * (W_up,e x_n) where token n
    chose expert e, else 0. changes are h and f, [B, T, E, F] to the same, or None. The network
    beside the experts (`shared`) is not changed. On one device only; E / K times `moe_layer`'s
    arithmetic.
    """
    on_gate, on_neurons = changes
    if parallel is not None or "tuned" in params["experts"]:
        raise InputError("neurons of experts are changed on one device, without ESFT's parts")
    num_sequences, num_tokens, d_model = x_BTD.shape
    x_ND = x_BTD.reshape(-1, d_model)
    mask_N = None if mask_BT is None else mask_BT.reshape(-1)
    routing = route(
        params["router"], x_ND, config, mask_N=mask_N, rng=rng, num_sequences=num_sequences
    )
    x_ND = expert_inputs(x_ND, config, rng)
    w = {name: leaf.astype(x_ND.dtype) for name, leaf in params["experts"].items()}
    weights_NE = routing.dense_weights(x_ND.shape[0], config.num_experts)

    def affine(form: str, x: jax.Array, name: str) -> jax.Array:
        y = jnp.einsum(form, x, w[f"w_{name}"], preferred_element_type=jnp.float32)
        return y.astype(x.dtype) + w.get(f"b_{name}", jnp.zeros((), x.dtype))

    gate_NEF, up_NEF = (affine("nd,edf->nef", x_ND, name) for name in ("gate", "up"))
    chosen_NE1 = weights_NE[..., None] != 0
    shape = num_sequences, num_tokens, *gate_NEF.shape[1:]

    def by_place(change: OnPlace | None, x_NEF: jax.Array) -> jax.Array:
        return x_NEF if change is None else change(x_NEF.reshape(shape)).reshape(x_NEF.shape)

    gate_NEF = by_place(on_gate, jnp.where(chosen_NE1, activation(gate_NEF), 0))
    a_NEF = by_place(on_neurons, jnp.where(chosen_NE1, gate_NEF * up_NEF, 0))
    y_ND = jnp.einsum("ned,ne->nd", affine("nef,efd->ned", a_NEF, "down"), weights_NE)
    y_ND = add_shared_network(params, y_ND.astype(x_ND.dtype), x_ND, activation)
    stats = layer_stats(routing, x_BTD.shape[:2] if trace else None)
    return y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape), stats
