"""The feed-forward layer of chosen blocks of neurons, gated or not."""

from __future__ import annotations

from typing import Any

import jax

from moejax.core.errors import InputError
from moejax.ops.gated_ffn import Activation
from moejax.ops.sparse_matmul import chosen, sparse_matmul


def sparse_ffn(
    params: dict[str, Any],
    x_BD: jax.Array,
    chosen_K: jax.Array,
    activation: Activation,
    *,
    weight_BK: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`gated_ffn`, or ``act(x W_up + b_up) W_down + b_down``, over the chosen neurons alone.

        h[b, k, p] = weight[b, k] act(x[b] . gate[chosen[k], p]) (x[b] . up[chosen[k], p])
        out[b]     = sum_kp h[b, k, p] down[chosen[k], p] + b_down

    params: rows_up and rows_down [M, P, D], rows_gate for a gated layer, and maybe b_gate, b_up
    [M, P] and b_down [D]. x, result: [B, D]. weight: factors of blocks per row, such as 0 for a
    block that only another row chose; None: 1. implementation and what is raised: as in
    `sparse_matmul`, which the products are; `tpu` is one kernel of all three, `gpu` two.
    """
    names: list[str] = [name for name in ("rows_gate", "rows_up", "rows_down") if name in params]
    shapes = {params[name].shape for name in names}
    if len(shapes) != 1 or x_BD.ndim != 2:
        raise InputError(
            f"sparse_ffn takes x [B, D] and rows of one shape [M, P, D], got {x_BD.shape} and "
            f"{', '.join(f'{name} {list(params[name].shape)}' for name in names)}"
        )
    kernel = chosen(implementation, params["rows_up"].dtype)
    if kernel in ("gpu", "tpu"):
        if kernel == "gpu":  # Pallas is slow to import
            from moejax.ops.sparse_matmul_gpu import sparse_ffn_gpu as whole
        else:
            from moejax.ops.sparse_matmul_tpu import sparse_ffn_tpu as whole

        out_BD = whole(params, x_BD, chosen_K, activation, weight_BK).astype(x_BD.dtype)
        return out_BD + params["b_down"].astype(x_BD.dtype) if "b_down" in params else out_BD

    def into(name: str) -> jax.Array:
        y = sparse_matmul(x_BD, params[f"rows_{name}"], chosen_K, implementation=implementation)
        return y + params[f"b_{name}"][chosen_K].astype(y.dtype) if f"b_{name}" in params else y

    h_BKP = (
        activation(into("gate")) * into("up") if "rows_gate" in params else activation(into("up"))
    )
    if weight_BK is not None:
        h_BKP = h_BKP * weight_BK[:, :, None].astype(h_BKP.dtype)
    out_BD = sparse_matmul(h_BKP, params["rows_down"], chosen_K, implementation=implementation)
    return out_BD + params["b_down"].astype(out_BD.dtype) if "b_down" in params else out_BD
