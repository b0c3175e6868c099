"""Multi-head latent attention: every head's keys and values come out of one vector per token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core.errors import InputError
from moejax.models.attend import attend
from moejax.models.mha import AttentionInputs, Extend, OnHeads
from moejax.ops import by_rows
from moejax.ops.attention import AttentionSpec
from moejax.ops.attention_spec import Window
from moejax.ops.norm import rms_norm
from moejax.ops.rope import RopeConfig, apply_rope, yarn_scale


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Sizes of multi-head latent attention, with DeepSeek-V2's as defaults.

    Attributes:
      kv_rank: R, size of the vector that keys and values are made of.
      q_rank: size of the one that queries are made of; None: queries come from the token itself.
      nope_size: channels of a query or key that know no position. rope_size: P, of those that do;
        their keys are shared by all heads. v_size: channels of a value.
      interleaved: rope turns channels 2i and 2i + 1 together, as DeepSeek's weights lie; else i
        and i + P/2.
      norm_eps: of the norms of the two small vectors (DeepSeek's code has 1e-6 whatever the
        model's other norms have).
    """

    kv_rank: int = 512
    q_rank: int | None = 1536
    nope_size: int = 128
    rope_size: int = 64
    v_size: int = 128
    interleaved: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self):
        for name in ("kv_rank", "q_rank", "nope_size", "rope_size", "v_size"):
            value = getattr(self, name)
            optional = name == "q_rank" and value is None
            if not optional and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} must be a positive integer, got {value!r}")
        if self.rope_size % 2:
            raise InputError(f"rope_size must be even, got {self.rope_size}")

    @property
    def head_size(self) -> int:
        """Channels of a query or key."""
        return self.nope_size + self.rope_size

    @property
    def latent_size(self) -> int:
        """Numbers that a cache keeps per token and layer, whatever the number of heads: R + P."""
        return self.kv_rank + self.rope_size


def mla_shapes(
    d_model: int, num_heads: int, config: MLAConfig, bias: bool = False
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of one layer's parameters; bias: of the two down projections and the last."""
    h, r = num_heads, config.kv_rank
    shapes: dict[str, tuple[int, ...]]
    if config.q_rank is None:
        shapes = {"w_q": (d_model, h, config.head_size)}
    else:
        shapes = {
            "w_q_down": (d_model, config.q_rank),
            "q_norm/scale": (config.q_rank,),
            "w_q_up": (config.q_rank, h, config.head_size),
        }
    shapes |= {
        "w_kv_down": (d_model, config.latent_size),
        "kv_norm/scale": (r,),
        "w_kv_up": (r, h, config.nope_size + config.v_size),
        "w_o": (h, config.v_size, d_model),
    }
    if bias:
        if config.q_rank is not None:
            shapes["b_q_down"] = (config.q_rank,)
        shapes |= {"b_kv_down": (config.latent_size,), "b_o": (d_model,)}
    return shapes


def yarn_softmax_scale(rope: RopeConfig, head_size: int) -> float | None:
    """DeepSeek's factor of the scores under yarn: head_size^-1/2 (0.1 mscale_all_dim ln f + 1)^2.

    Source: `DeepseekV2Attention` and `yarn_get_mscale` of modeling_deepseek.py, which is released
    with the weights; read in copies of it that others publish, since the hub was out of reach.

    None, which is head_size^-1/2, without mscale_all_dim. InputError where only one of mscale and
    mscale_all_dim is there: the released code and transformers then make different things of it.
    """
    if bool(rope.mscale) != bool(rope.mscale_all_dim):
        raise InputError(
            f"rope scaling has mscale {rope.mscale} and mscale_all_dim {rope.mscale_all_dim}: "
            "give both or neither (0 is none)"
        )
    if not rope.mscale_all_dim:
        return None
    return head_size**-0.5 * yarn_scale(rope.factor, rope.mscale_all_dim) ** 2


def mla(
    config: MLAConfig,
    params: dict[str, Any],
    x_BTD: jax.Array,
    inputs: AttentionInputs,
    extend: Extend,
    window: Window = 0,
    on_heads: OnHeads | None = None,
) -> tuple[jax.Array, Any]:
    """DeepSeek-V2's attention (arXiv 2405.04434, section 2.1, eq. 37 to 47).

        c_t = norm(W_kv_down x_t)    k_t,h = [W_k,h c_t ; rope(W_r x_t)]    v_t,h = W_v,h c_t

    The cache keeps [c_t ; rope(W_r x_t)], R + P numbers per token. Few queries before many cached
    keys are computed without making those keys and values: q.(W_k c) = (W_k^T q).c, and the
    values' mixture is W_v times the mixture of c ("absorbed"). Otherwise they are made.

    Args:
      config: sizes.
      params: the tree of `mla_shapes`.
      x_BTD: the normed input.
      inputs: its `turn` is that of P channels; a scale of None is head_size^-1/2.
      extend: takes and gives [B, 1, S, R + P], and nothing ([..., 0]) in place of values.
      window: as in `moejax.ops.attention.attention`.
      on_heads: changes what the heads mixed.

    Returns ([B, T, D], extend's new state).
    """
    spec = scaled(config, inputs.spec)
    q_BTHC = _queries(config, params, x_BTD, inputs)
    latent_B1SK = latent(config, params, x_BTD, inputs)[:, None]
    latent_B1SK, _, state = extend(latent_B1SK, latent_B1SK[..., :0])
    sizes = q_BTHC.shape[1], latent_B1SK.shape[2]
    cached = inputs.visible.slot is not None
    # Pages are read where they lie, so nothing is made of all of them at once.
    paged = inputs.visible.pages_BP is not None
    absorbs = paged or (cached and _is_absorbing_cheaper(config, *sizes))
    attend = _absorbed if absorbs else _expanded
    mixed_BTHC = attend(config, params["w_kv_up"], q_BTHC, latent_B1SK, (inputs, window, spec))
    mixed_BTHC = mixed_BTHC if on_heads is None else on_heads(mixed_BTHC)
    w_o = params["w_o"].reshape(-1, x_BTD.shape[-1])
    out_BTD = by_rows.matmul(mixed_BTHC.reshape(*x_BTD.shape[:2], -1), w_o)
    return (out_BTD + params["b_o"] if "b_o" in params else out_BTD), state


def _queries(config: MLAConfig, params, x_BTD, inputs: AttentionInputs) -> jax.Array:
    """[B, T, H, N + P], the last P channels turned."""
    w = params["w_q" if config.q_rank is None else "w_q_up"]
    q_BTHC = by_rows.einsum("...x,xhc->...hc", query_input(config, params, x_BTD), w)
    still, turning = jnp.split(q_BTHC, [config.nope_size], axis=-1)
    return jnp.concatenate([still, turned(config, turning, inputs)], axis=-1)


def query_input(config: MLAConfig, params, x_BTD: jax.Array) -> jax.Array:
    """[B, T, X]: what the heads' queries are made of, x itself or its narrower form."""
    if config.q_rank is None:
        return x_BTD
    down = affine(params, "q_down", x_BTD)
    return rms_norm(down, params["q_norm"]["scale"], config.norm_eps)


def scaled(config: MLAConfig, spec: AttentionSpec) -> AttentionSpec:
    """The spec with head_size^-1/2 where it has no scale."""
    if spec.scale is not None:
        return spec
    return dataclasses.replace(spec, scale=config.head_size**-0.5)


def latent(config: MLAConfig, params, x_BTD, inputs: AttentionInputs) -> jax.Array:
    """[B, T, R + P]: what the cache keeps of each token."""
    down = affine(params, "kv_down", x_BTD)
    c_BTR, k_BTP = jnp.split(down, [config.kv_rank], axis=-1)
    c_BTR = rms_norm(c_BTR, params["kv_norm"]["scale"], config.norm_eps)
    k_BTP = turned(config, k_BTP[:, :, None], inputs)[:, :, 0]
    return jnp.concatenate([c_BTR, k_BTP], axis=-1)


def affine(params, name: str, x: jax.Array) -> jax.Array:
    """x w_NAME + b_NAME, if there is a bias."""
    y = by_rows.matmul(x, params[f"w_{name}"])
    return y + params[f"b_{name}"] if f"b_{name}" in params else y


def turned(config: MLAConfig, x_BTHP: jax.Array, inputs: AttentionInputs) -> jax.Array:
    """Rope, of queries and keys alike."""
    # Pairs are put apart and stay so: queries and keys are permuted alike, their products are not.
    if config.interleaved:
        pairs = x_BTHP.reshape(*x_BTHP.shape[:-1], -1, 2)
        x_BTHP = jnp.swapaxes(pairs, -1, -2).reshape(x_BTHP.shape)
    assert inputs.turn is not None
    return apply_rope(x_BTHP, *inputs.turn)


def _is_absorbing_cheaper(config: MLAConfig, num_queries: int, num_keys: int) -> bool:
    """Compares the multiplications of `_absorbed` and `_expanded`, per head."""
    t, s = num_queries, num_keys
    up = config.kv_rank * (config.nope_size + config.v_size)
    return t * (2 * s * config.latent_size + up) < s * (t * (config.head_size + config.v_size) + up)


Rest = tuple[AttentionInputs, Window, AttentionSpec]


def _absorbed(config: MLAConfig, w_kv_up_RHC, q_BTHC, latent_B1SK, rest: Rest) -> jax.Array:
    """The heads share one key per token, the latent vector, which is its value too."""
    inputs, window, spec = rest
    w_k_RHN, w_v_RHC = jnp.split(w_kv_up_RHC, [config.nope_size], axis=-1)
    still, turned = jnp.split(q_BTHC, [config.nope_size], axis=-1)
    asked_BTHR = jnp.einsum("bthn,rhn->bthr", still, w_k_RHN)
    q_BTHK = jnp.concatenate([asked_BTHR, turned], axis=-1)
    # Mixing the P channels of rope too, and dropping them, spares a copy of the cache.
    mixed_BTHK = attend(q_BTHK, latent_B1SK, latent_B1SK, inputs, window, spec)
    return jnp.einsum("bthr,rhc->bthc", mixed_BTHK[..., : config.kv_rank], w_v_RHC)


def _expanded(config: MLAConfig, w_kv_up_RHC, q_BTHC, latent_B1SK, rest: Rest) -> jax.Array:
    """Every head's keys and values, made of the latent vectors."""
    inputs, window, spec = rest
    c_BSR, k_BSP = jnp.split(latent_B1SK[:, 0], [config.kv_rank], axis=-1)
    kv_BHSC = jnp.einsum("bsr,rhc->bhsc", c_BSR, w_kv_up_RHC)
    k_BHSN, v_BHSC = jnp.split(kv_BHSC, [config.nope_size], axis=-1)
    shared_BHSP = jnp.broadcast_to(k_BSP[:, None], (*k_BHSN.shape[:3], config.rope_size))
    k_BHSC = jnp.concatenate([k_BHSN, shared_BHSP], axis=-1)
    return attend(q_BTHC, k_BHSC, v_BHSC, inputs, window, spec)
