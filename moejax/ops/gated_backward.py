"""The elementwise middle of the backward pass of weighted gated experts."""

import jax
import jax.numpy as jnp

from moejax.ops.gated_ffn import Activation
from moejax.ops.grouped_matmul import chosen


def gated_backward(
    gate_RF: jax.Array,
    up_RF: jax.Array,
    d_hidden_RF: jax.Array,
    weights_R: jax.Array,
    activation: Activation,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of y_r = w_r (act(gate_r) * up_r) W_down: dL/dgate, dL/dup, w_r hidden_r and dL/dw_r.

    d_hidden [R, F]: dL/dy_r W_down^T, without w_r. gate, up [R, F] of one dtype, which the first
    three results have too; weights [R] and the last result [R] are float32. Its sums are float32.
    `tpu` reads and writes each array once, where the rows are a multiple of 16.
    """
    if chosen(implementation) == "tpu":
        from moejax.ops.tpu_gated import gated_backward_tpu, takes  # Pallas is slow to import

        if takes(gate_RF):
            return gated_backward_tpu(gate_RF, up_RF, d_hidden_RF, weights_R, activation)
    hidden_RF, pull = jax.vjp(lambda gate, up: activation(gate) * up, gate_RF, up_RF)
    products_RF = hidden_RF.astype(jnp.float32) * d_hidden_RF.astype(jnp.float32)

    def weighted(a_RF: jax.Array) -> jax.Array:
        return (weights_R[:, None] * a_RF).astype(gate_RF.dtype)

    d_gate_RF, d_up_RF = pull(weighted(d_hidden_RF))
    return d_gate_RF, d_up_RF, weighted(hidden_RF), products_RF.sum(axis=1)
