"""The backward pass of weighted experts, written out: the rows' gradients first, then the weights'.

y_r = w_r (act(x_r W_gate + b_gate) * (x_r W_up + b_up)) W_down + w_r b_down, with the matrices of
row r's expert. The hidden layer is computed again; y is not, as dL/dw_r = <h_r, dy_r W_down^T>.
Each step is a function of its own, so that rows may travel while another is computed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.moe.experts import ExpertParams, bias_rows
from moejax.ops.gated_backward import gated_backward
from moejax.ops.gated_ffn import Activation
from moejax.ops.group_sizes import GroupSizes, plain
from moejax.ops.grouped_gated import gated_products
from moejax.ops.grouped_matmul import grouped_matmul
from moejax.ops.grouped_outer import grouped_outer, room_for_sums


@dataclasses.dataclass(frozen=True)
class Block:
    """What computes: rows of each expert [E], the activation, a grouped matmul's name."""

    group_sizes_E: GroupSizes
    activation: Activation
    implementation: str | None

    def times(self, x_R: jax.Array, w: jax.Array) -> jax.Array:
        return grouped_matmul(x_R, w, self.group_sizes_E, implementation=self.implementation)


def gate_and_up(block: Block, params: ExpertParams, rows_RD: jax.Array) -> dict[str, jax.Array]:
    """What the forward pass had before the activation, [R, F] each."""

    def affine(name: str) -> jax.Array:
        y_RF = block.times(rows_RD, params[f"w_{name}"].astype(rows_RD.dtype))
        bias = f"b_{name}"
        if bias not in params:
            return y_RF
        cast = {bias: params[bias].astype(rows_RD.dtype)}
        return y_RF + bias_rows(cast, bias, y_RF, block.group_sizes_E)

    return {"gate": affine("gate"), "up": affine("up")}


def hidden_and_products(
    block: Block, params: ExpertParams, rows_RD: jax.Array
) -> dict[str, jax.Array]:
    """`gate_and_up`, and the hidden layer that is made of them."""
    if "b_gate" in params or "b_up" in params:
        made = gate_and_up(block, params, rows_RD)
        return {"hidden": block.activation(made["gate"]) * made["up"], **made}
    w_gate, w_up = (params[name].astype(rows_RD.dtype) for name in ("w_gate", "w_up"))
    hidden_RF, gate_RF, up_RF = gated_products(
        rows_RD,
        w_gate,
        w_up,
        block.group_sizes_E,
        block.activation,
        implementation=block.implementation,
    )
    return {"hidden": hidden_RF, "gate": gate_RF, "up": up_RF}


def rows_backward(
    block: Block,
    params: ExpertParams,
    got: dict[str, jax.Array],
    before: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Gradients of the rows and of their weights, and what `params_backward` needs.

    got: "x" [R, D], "weights" [R], "d_y" [R, D]. before: what `gate_and_up` gave.
    """
    rows_RD, weights_R, d_y_RD = got["x"], got["weights"], got["d_y"]
    gate_RF, up_RF = before["gate"], before["up"]
    cast = {name: w.astype(rows_RD.dtype) for name, w in params.items()}
    d_hidden_RF = _rows_gradient(block, gate_RF, cast["w_down"], d_y_RD)
    d_gate_RF, d_up_RF, hidden_RF, d_weights_R = gated_backward(
        gate_RF,
        up_RF,
        d_hidden_RF,
        weights_R,
        block.activation,
        implementation=block.implementation,
    )
    if "b_down" in cast:
        bias_RD = bias_rows(cast, "b_down", d_y_RD, block.group_sizes_E)
        d_weights_R += jnp.sum(bias_RD.astype(jnp.float32) * d_y_RD.astype(jnp.float32), axis=1)
    made = (d_gate_RF, d_up_RF, hidden_RF, d_weights_R)
    # Of what they are made of nothing is in memory beside the products that follow.
    d_gate_RF, d_up_RF, hidden_RF, d_weights_R = jax.lax.optimization_barrier(made)
    d_rows_RD = _rows_gradient(block, rows_RD, cast["w_gate"], d_gate_RF)
    d_rows_RD += _rows_gradient(block, rows_RD, cast["w_up"], d_up_RF)
    rest = {"x": rows_RD, "d_y": d_y_RD, "hidden": hidden_RF, "weights": weights_R}
    return d_rows_RD, d_weights_R, {**rest, "d_gate": d_gate_RF, "d_up": d_up_RF}


def no_gradients(params: ExpertParams, implementation: str | None) -> ExpertParams:
    """What `params_backward` adds to at first."""
    return {
        name: room_for_sums(w.shape, implementation)
        if name.startswith("w_")
        else jnp.zeros(w.shape, jnp.float32)
        for name, w in params.items()
    }


def params_backward(
    block: Block,
    params: ExpertParams,
    rest: dict[str, jax.Array],
    total: ExpertParams,
    begins: jax.Array | bool,
) -> ExpertParams:
    """Gradients of the experts' matrices and biases in float32, added to `total`.

    begins: whether that is `no_gradients` still.
    """
    sides, found = {"gate": ("x", "d_gate"), "up": ("x", "d_up"), "down": ("hidden", "d_y")}, {}
    for name, (left, right) in sides.items():
        found[f"w_{name}"] = grouped_outer(
            rest[left],
            rest[right],
            block.group_sizes_E,
            total[f"w_{name}"],
            begins,
            implementation=block.implementation,
        )
    for name, (_, right) in sides.items():
        if f"b_{name}" in params:
            d_R = rest[right].astype(jnp.float32)
            d_R = rest["weights"][:, None] * d_R if name == "down" else d_R
            sums = _sums_by_group(d_R, plain(block.group_sizes_E))
            found[f"b_{name}"] = total[f"b_{name}"] + sums
    return found


def _rows_gradient(block: Block, x_R: jax.Array, w: Any, d_R: jax.Array) -> jax.Array:
    return jax.vjp(lambda x_R: block.times(x_R, w), x_R)[1](d_R)[0]


def _sums_by_group(d_R: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Each group's sum of rows, [E, F]; the rows past the groups are in none."""
    ends_E = jnp.cumsum(group_sizes_E)
    rows_R1 = jnp.arange(d_R.shape[0])[:, None]
    inside_RE = (rows_R1 >= ends_E - group_sizes_E) & (rows_R1 < ends_E)
    d_R = jnp.where(rows_R1 < ends_E[-1], d_R, 0)  # zero times what is nobody's could be NaN
    return jnp.einsum("re,rf->ef", inside_RE.astype(jnp.float32), d_R)
