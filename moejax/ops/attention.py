"""Softmax attention with grouped keys and values: one function, several ways to compute it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core.platform import platform
from moejax.ops.attention_blockwise import blockwise_attention
from moejax.ops.attention_paged import paged_attention
from moejax.ops.attention_spec import Visible, Window, mask_of, soft_capped
from moejax.ops.attention_splash import splash_attention, splash_can
from moejax.ops.wide_product import wide_product

__all__ = ["AttentionSpec", "Visible", "Window", "attention", "choose", "shared_mask"]
__all__ += ["cudnn_can", "soft_capped"]

# Scores of so many bytes per layer (float32) are kept at once before keys are read block by block.
MAX_SCORE_BYTES = 1 << 30
# Shorter texts are not worth splash attention's fixed blocks of 128 tokens.
MIN_SPLASH_TOKENS = 512
# On a CPU blocks stay in its cache. Forward and backward on two cores (9 heads, 3 groups, C = 64),
# in blocks against all scores at once: 20 ms against 35 at 512 tokens, 59 / 214 at 1024, 660 / 3899
# at 4096; in a whole training step below 512 tokens there is no difference.
MIN_BLOCKWISE_TOKENS_ON_CPU = 512


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What every layer's attention has in common.

    Attributes:
      scale: factor of the scores; None is C^-1/2.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap); None: they do not.
      windows: the values that a window may take, where it is not known when compiling.
      fused: cuDNN takes such heads (`cudnn_can`), so `choose` may choose it.
      implementation: a name of `IMPLEMENTATIONS`; None chooses by `choose`.
    """

    scale: float | None = None
    soft_cap: float | None = None
    windows: tuple[int, ...] = (0,)
    implementation: str | None = None
    fused: bool = False


def attention(
    q_BTHC: jax.Array,
    k_BGSC: jax.Array,
    v_BGSC: jax.Array,
    visible: Visible,
    window: Window = 0,
    spec: AttentionSpec = AttentionSpec(),
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) with grouped keys and values.

        out_i = sum_j softmax_j(cap(scale q_i k_j)) v_j    over the keys j that query i sees

    Args:
      q_BTHC: queries; H is a multiple of G and head h reads group h // (H / G).
      k_BGSC, v_BGSC: keys and values, heads first: the order in which they are multiplied, so
        that a cache kept in it is read without a copy. Values may have a size of their own.
      visible: which keys a query sees: earlier ones, of its segment, not padding.
      window: and of these only the last so many, itself included; 0 is all. An int, or an int32
        scalar (one of `spec.windows`) for a layer inside a scan.
      spec: scale, soft cap, implementation.

    Returns:
      [B, T, H, Cv] in q's dtype; scores and softmax are float32. What a query that sees nothing
      gets is finite and has no meaning: such queries are padding and nothing reads them.

    Errors:
      NotImplementedError: the implementation that was asked for cannot do this input.
    """
    name = spec.implementation
    if name is None:
        shape = (q_BTHC.shape[0], q_BTHC.shape[1], q_BTHC.shape[2])
        name = _choose_here(shape, k_BGSC.shape[2], visible, fused=spec.fused)
    if (name == "paged") != (visible.pages_BP is not None):
        lies = "not in pages" if name == "paged" else "in pages"
        raise NotImplementedError(f"attention {name!r} and a cache that is {lies}: use None")
    if name not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"attention implementation {name!r} is unknown: use one of {known}")
    scale = q_BTHC.shape[-1] ** -0.5 if spec.scale is None else spec.scale
    compute = IMPLEMENTATIONS[name]

    def with_window(window: Window):
        def run(q, k, v):
            return compute(q, k, v, visible, window, scale, spec.soft_cap)

        return run

    if isinstance(window, int) or name not in STATIC_WINDOW:
        return with_window(window)(q_BTHC, k_BGSC, v_BGSC)
    # One program for each window, of which a layer runs its own.
    kinds = sorted(set(spec.windows))
    which = jnp.searchsorted(jnp.asarray(kinds), window)
    return jax.lax.switch(which, [with_window(w) for w in kinds], q_BTHC, k_BGSC, v_BGSC)


def shared_mask(
    visible: Visible,
    spec: AttentionSpec,
    q_shape: tuple[int, int, int],
    num_keys: int,
    num_devices: int | None = None,
) -> tuple[Visible, AttentionSpec]:
    """Chooses the implementation for queries [B, T, H], and writes the mask out if it reads one.

    For the caller of many layers: they then share one mask. num_devices: that XLA is to split one
    call over; None is all there are.
    """
    name = spec.implementation or _choose_here(q_shape, num_keys, visible, num_devices, spec.fused)
    if name in ("dense", "jax"):
        mask_BTS = mask_of(visible, q_shape[1], num_keys)
        visible = dataclasses.replace(visible, mask_BTS=mask_BTS)
    return visible, dataclasses.replace(spec, implementation=name)


def choose(
    q_shape: tuple[int, int, int],
    num_keys: int,
    visible: Visible,
    backend: str,
    num_devices: int = 1,
    fused: bool = False,
) -> str:
    """The implementation for queries [B, T, H]: "splash" on TPUs, "blockwise" for long texts.

    "paged" for a cache in pages, and only that; "cudnn" for whole texts on a GPU where it can
    (`fused`), unless the mask of their segments is too large. Else "dense", as for all that reads
    from a cache, unless that is too long. "jax" is there to be asked for by name. "splash" and
    "cudnn" are not chosen where XLA is to split a call over several devices: it cannot split a
    kernel (`moejax.models.attend` does it itself).
    """
    if visible.pages_BP is not None:
        return "paged"
    num_batch, num_queries, num_heads = q_shape
    long_enough = num_queries >= MIN_SPLASH_TOKENS
    one_tpu = backend == "tpu" and num_devices == 1
    if one_tpu and long_enough and splash_can(num_queries, num_keys, visible):
        return "splash"
    whole_text = visible.slot is None
    mask_bytes = 0 if visible.segments_BT is None else 2 * num_batch * num_queries * num_keys
    one_gpu = backend == "gpu" and num_devices == 1
    if one_gpu and fused and whole_text and mask_bytes <= MAX_SCORE_BYTES:
        return "cudnn"
    if backend == "cpu" and whole_text and num_queries >= MIN_BLOCKWISE_TOKENS_ON_CPU:
        return "blockwise"
    score_bytes = 4 * num_batch * num_heads * num_queries * num_keys
    return "blockwise" if score_bytes > MAX_SCORE_BYTES else "dense"


def _choose_here(
    q_shape: tuple[int, int, int],
    num_keys: int,
    visible: Visible,
    num_devices: int | None = None,
    fused: bool = False,
) -> str:
    if num_devices is None:
        num_devices = jax.device_count()
    return choose(q_shape, num_keys, visible, platform(), num_devices, fused)


def cudnn_can(key_size: int, value_size: int, dtype: Any, soft_cap: float | None) -> bool:
    """Whether cuDNN's attention takes heads of these sizes here; asks it, which needs a GPU."""
    if platform() != "gpu" or soft_cap is not None or key_size != value_size:
        return False
    return _cudnn_takes(key_size, jnp.dtype(dtype))


@functools.cache
def _cudnn_takes(key_size: int, dtype: Any) -> bool:
    q = jax.ShapeDtypeStruct((1, 128, 1, key_size), dtype)
    try:
        jax.eval_shape(
            functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"),
            *(q, q, q),
        )
    except (ValueError, RuntimeError, NotImplementedError, TypeError):  # its ways to say no
        return False
    return True


def dense_attention(
    q_BTHC: jax.Array,
    k_BGSC: jax.Array,
    v_BGSC: jax.Array,
    visible: Visible,
    window: Window,
    scale: float,
    soft_cap: float | None,
) -> jax.Array:
    """The definition: all scores at once. Memory T * S per head; the oracle of the others."""
    num_batch, num_queries, num_heads, head_size = q_BTHC.shape
    num_groups = k_BGSC.shape[1]
    mask_BTS = mask_of(visible, num_queries, k_BGSC.shape[2], window)
    q = q_BTHC.reshape(num_batch, num_queries, num_groups, num_heads // num_groups, head_size)
    q_BGTJC = jnp.transpose(q, (0, 2, 1, 3, 4))  # J: the heads that share one group
    scores = wide_product(functools.partial(jnp.einsum, "bgtjc,bgsc->bgtjs"), q_BGTJC, k_BGSC)
    scores = soft_capped(scores * scale, soft_cap)
    scores = jnp.where(mask_BTS[:, None, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BGSC.dtype)
    out_BGTJC = jnp.einsum("bgtjs,bgsc->bgtjc", weights, v_BGSC)
    out_BTGJC = jnp.transpose(out_BGTJC, (0, 2, 1, 3, 4))
    return out_BTGJC.reshape(num_batch, num_queries, num_heads, v_BGSC.shape[-1])


def jax_attention(
    q_BTHC, k_BGSC, v_BGSC, visible: Visible, window: Window, scale, soft_cap
) -> jax.Array:
    """`jax.nn.dot_product_attention` in plain XLA; memory T * S per head."""
    _refuse("jax", soft_cap, q_BTHC, v_BGSC)
    mask_BTS = mask_of(visible, q_BTHC.shape[1], k_BGSC.shape[2], window)
    k_BSGC, v_BSGC = jnp.swapaxes(k_BGSC, 1, 2), jnp.swapaxes(v_BGSC, 1, 2)
    return jax.nn.dot_product_attention(
        q_BTHC, k_BSGC, v_BSGC, mask=mask_BTS[:, None], scale=scale, implementation="xla"
    )


def cudnn_attention(
    q_BTHC, k_BGSC, v_BGSC, visible: Visible, window: Window, scale, soft_cap
) -> jax.Array:
    """`jax.nn.dot_product_attention` by cuDNN's flash attention: NVIDIA GPUs, 16-bit, no cache.

    Segments become a mask of T * S.
    """
    _refuse("cudnn", soft_cap, q_BTHC, v_BGSC)
    if visible.slot is not None:
        raise NotImplementedError("attention 'cudnn' takes no cache: use 'dense' or 'blockwise'")
    assert isinstance(window, int)
    mask = None
    if visible.segments_BT is not None:
        mask = mask_of(visible, q_BTHC.shape[1], k_BGSC.shape[2], window)[:, None]
    k_BSGC, v_BSGC = jnp.swapaxes(k_BGSC, 1, 2), jnp.swapaxes(v_BGSC, 1, 2)
    return jax.nn.dot_product_attention(
        q_BTHC,
        k_BSGC,
        v_BSGC,
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )


def _refuse(name: str, soft_cap: float | None, q_BTHC, v_BGSC) -> None:
    if soft_cap is not None:
        raise NotImplementedError(f"attention {name!r} has no soft cap: use 'dense' or 'blockwise'")
    if q_BTHC.shape[-1] != v_BGSC.shape[-1]:
        raise NotImplementedError(
            f"attention {name!r} needs keys and values of one size, got {q_BTHC.shape[-1]} and "
            f"{v_BGSC.shape[-1]}: use 'dense' or 'blockwise'"
        )


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "dense": dense_attention,
    "blockwise": blockwise_attention,
    "paged": paged_attention,
    "splash": splash_attention,
    "jax": jax_attention,
    "cudnn": cudnn_attention,
}
# These are compiled for one window.
STATIC_WINDOW = ("splash", "cudnn")
