"""ragged_all_to_all, also where XLA has none, and dropless expert parallelism in one such exchange.

Only rows that are there travel, in one exchange each way; what is received is as large as the worst
case, all tokens of all P senders: `moejax.moe.chunked` bounds that.
"""

import jax
import jax.numpy as jnp

from moejax.core.platform import platform


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """`jax.lax.ragged_all_to_all` along a mesh axis of P devices, emulated on the CPU.

    Device i sends operand[input_offsets[j] :][: send_sizes[j]] to device j, which has it in
    output[output_offsets[j] :]; what nobody writes keeps output's values. recv_sizes[j] is what
    device j sends here. operand [N, ...], output [M, ...], the others int32 [P]. Differentiable.
    """
    sizes = (input_offsets, send_sizes, output_offsets, recv_sizes)
    if platform() != "cpu":
        return jax.lax.ragged_all_to_all(operand, output, *sizes, axis_name=axis_name)
    return emulated_ragged_all_to_all(operand, output, *sizes, axis_name=axis_name)


def emulated_ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """The same by an all_gather of every device's operand: P times the bytes and the memory.

    A later sender wins where two write one row, which the original leaves open.
    """
    del recv_sizes  # each device sees what the others send
    num_rows = operand.shape[0]
    all_PN = jax.lax.all_gather(operand, axis_name)
    here = jax.lax.axis_index(axis_name)
    about = jnp.stack([input_offsets, send_sizes, output_offsets])
    about_P = jax.lax.all_gather(about, axis_name)[:, :, here]  # what each sender does to this one
    from_P, sizes_P, to_P = about_P[:, 0], about_P[:, 1], about_P[:, 2]
    row_M1 = jnp.arange(output.shape[0])[:, None]
    hit_MP = (row_M1 >= to_P) & (row_M1 < to_P + sizes_P)
    sender_M = hit_MP.shape[1] - 1 - jnp.argmax(hit_MP[:, ::-1], axis=1)
    row_M = row_M1[:, 0] - to_P[sender_M] + from_P[sender_M]
    found = all_PN[sender_M, jnp.clip(row_M, 0, num_rows - 1)]
    written_M = hit_MP.any(axis=1).reshape((-1, *(1 for _ in output.shape[1:])))
    return jnp.where(written_M, found, output)


def exclusive_sums(sizes: jax.Array, axis: int = 0) -> jax.Array:
    """Where each of consecutive pieces starts."""
    return jnp.cumsum(sizes, axis=axis) - sizes
