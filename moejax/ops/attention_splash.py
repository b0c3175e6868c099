"""Splash attention: JAX's own Pallas kernel for TPUs, which leaves empty blocks out."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from moejax.ops.attention_spec import Visible, Window
from moejax.ops.kept import ATTENTION

LANES = 128
MAX_BLOCK = 512


def splash_can(num_queries: int, num_keys: int, visible: Visible) -> bool:
    """Whether the kernel takes these: no cache, no padding on the left, whole blocks of tokens."""
    plain = visible.slot is None and visible.start_B is None
    return plain and num_queries == num_keys and num_queries % LANES == 0


def _blocks(size: int) -> kernel.BlockSizes:
    return kernel.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )


def splash_attention(
    q_BTHC: jax.Array,
    k_BGSC: jax.Array,
    v_BGSC: jax.Array,
    visible: Visible,
    window: Window,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """`moejax.ops.attention.attention` by the kernel; memory linear in the length of the text.

    window: an int, for it decides which blocks exist. Compiled for anything but a TPU the kernel's
    program is interpreted, slowly.
    """
    if not splash_can(q_BTHC.shape[1], k_BGSC.shape[2], visible):
        raise NotImplementedError(
            f"attention 'splash' takes whole texts of a multiple of {LANES} tokens, got "
            f"{q_BTHC.shape[1]} queries and {k_BGSC.shape[2]} keys"
            + (" in a cache" if visible.slot is not None else "")
        )
    assert isinstance(window, int)
    num_tokens, num_heads = q_BTHC.shape[1:3]
    block = next(size for size in (MAX_BLOCK, 256, LANES) if num_tokens % size == 0)
    shape = (num_tokens, num_tokens)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    segments = None
    if visible.segments_BT is not None:
        segments = kernel.SegmentIds(visible.segments_BT, visible.segments_BT)

    def attend(q, k, v, segments, *, interpret: bool):
        one_row = kernel.make_splash_mha(
            mask=masks.MultiHeadMask([mask] * num_heads),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=soft_cap,
            block_sizes=_blocks(block),
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )
        return jax.vmap(one_row, in_axes=(0, 0, 0, None if segments is None else 0))(
            q, k, v, segments
        )

    q_BHTC = jnp.swapaxes(q_BTHC * jnp.asarray(scale, q_BTHC.dtype), 1, 2)
    # Decided when it is lowered: a program may be compiled for a TPU that is not here.
    out_BHTC = jax.lax.platform_dependent(
        q_BHTC,
        k_BGSC,
        v_BGSC,
        segments,
        tpu=functools.partial(attend, interpret=False),
        default=functools.partial(attend, interpret=True),
    )
    return jnp.swapaxes(out_BHTC, 1, 2).astype(q_BTHC.dtype)
