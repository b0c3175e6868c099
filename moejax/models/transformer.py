"""The only decoder: pure functions over one parameter tree, and a thin Linen shell around them.

The tree is documented in `abstract_params`. Every function takes ``(params, config, ...)``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax.core import tree
from moejax.models.cache import KVCache
from moejax.models.config import LayerRun, ModelConfig
from moejax.models.layers import ACTIVATION
from moejax.models.mha import AttentionInputs, attention_shapes, mha
from moejax.moe.layer import MoEStats, moe_layer, moe_shapes
from moejax.ops.gated_ffn import ffn_shapes, gated_ffn
from moejax.ops.norm import rms_norm
from moejax.ops.rope import frequencies, rotation

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class ForwardOptions:
    """How to compute, never what.

    Attributes:
      compute_dtype: dtype of the arithmetic (routers and norms' statistics stay float32).
      remat: "none", "dots" (keep matrix products) or "full" (keep block inputs only).
      moe_implementation: a name of `moejax.ops.grouped_matmul.IMPLEMENTATIONS`, None chooses.
    """

    compute_dtype: str = "float32"
    remat: str = "none"
    moe_implementation: str | None = None

    def __post_init__(self):
        if self.remat not in ("none", *REMAT_POLICIES):
            raise ValueError(f"remat {self.remat!r} is unknown: use none, dots or full")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """hidden_BTD after the final norm; the cache, if one was given; router statistics [L, ...]."""

    hidden_BTD: jax.Array
    cache: KVCache | None
    stats: MoEStats | None


def abstract_params(config: ModelConfig, dtype: Any = "float32") -> tree.Tree:
    """Shapes and dtypes of the whole tree, before any array exists.

    ``embed/tokens [V, D]``, ``layers/<run>/{attn_norm,attn,mlp_norm,mlp|moe}/...`` stacked on a
    leading L, ``final_norm/scale [D]``, and ``lm_head/w [D, V]`` unless tied.
    """
    shapes: dict[str, tuple[int, ...]] = {"embed/tokens": (config.vocab_size, config.d_model)}
    for run in config.runs:
        for path, shape in _layer_shapes(config, run).items():
            shapes[f"layers/{run.name}/{path}"] = (run.num_layers, *shape)
    shapes["final_norm/scale"] = (config.d_model,)
    if not config.tie_embeddings:
        shapes["lm_head/w"] = (config.d_model, config.vocab_size)
    # A selection bias moves in steps of 0.001, which bfloat16 loses.
    dtypes = {path: "float32" if path.endswith("/b_select") else dtype for path in shapes}
    return tree.unflatten(
        {path: jax.ShapeDtypeStruct(shape, dtypes[path]) for path, shape in shapes.items()}
    )


def _layer_shapes(config: ModelConfig, run: LayerRun) -> dict[str, tuple[int, ...]]:
    d = config.d_model
    shapes: dict[str, tuple[int, ...]] = {"attn_norm/scale": (d,)}
    shapes |= {f"attn/{name}": shape for name, shape in attention_shapes(config).items()}
    shapes["mlp_norm/scale"] = (d,)
    if run.kind == "dense":
        mlp = ffn_shapes(d, config.d_ff, config.mlp_bias)
        return shapes | {f"mlp/{name}": shape for name, shape in mlp.items()}
    assert config.moe is not None
    moe = moe_shapes(d, config.d_ff, config.moe, config.mlp_bias)
    return shapes | {f"moe/{path}": shape for path, shape in moe.items()}


def init_leaf(path: str, key: jax.Array, leaf: jax.ShapeDtypeStruct, scale: float) -> jax.Array:
    """Random weights N(0, scale^2); norm scales one; biases and the router's noise zero."""
    name = path.rsplit("/", 1)[-1]
    if name == "scale":
        return jnp.ones(leaf.shape, leaf.dtype)
    if name.startswith("b_") or name == "w_noise":
        return jnp.zeros(leaf.shape, leaf.dtype)
    return (scale * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)


def init_params(config: ModelConfig, key: jax.Array, dtype: Any = "float32") -> tree.Tree:
    """Random parameters for training from scratch."""
    flat = tree.flatten(abstract_params(config, dtype))
    keys = jax.random.split(key, len(flat))
    return tree.unflatten(
        {
            path: init_leaf(path, k, leaf, config.initializer_range)
            for k, (path, leaf) in zip(keys, flat.items(), strict=True)
        }
    )


def forward(
    params: tree.Tree,
    config: ModelConfig,
    tokens_BT: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    cache: KVCache | None = None,
    rng: jax.Array | None = None,
    options: ForwardOptions = ForwardOptions(),
) -> Output:
    """Runs the decoder.

    Args:
      params: the tree of `abstract_params`, or of `split_layers`.
      config: the model.
      tokens_BT: int32 ids.
      positions_BT: int32; by default a token's index in its row. With a cache they follow from it.
      segment_ids_BT: int32; tokens see earlier tokens of their own segment only, 0 is padding.
      cache: continue from these keys and values; T new slots are filled.
      rng: key for the routers' exploration noise; None (evaluation) adds none.
      options: how to compute.

    Returns:
      hidden states after the final norm, the extended cache, router statistics.

    With "dynamic" rope a row's frequencies follow its longest position (with a cache: its
    `rope_length_B`), so packed rows share those of their longest segment.
    """
    inputs = _attention_inputs(config, tokens_BT, positions_BT, segment_ids_BT, cache)
    mask_BT = None if segment_ids_BT is None else segment_ids_BT > 0
    if cache is not None:
        slots = cache.length + jnp.arange(tokens_BT.shape[1])
        mask_BT = slots[None, :] >= cache.start_B[:, None]
    x_BTD = params["embed"]["tokens"][tokens_BT].astype(options.compute_dtype)
    new_k, new_v, stats = {}, {}, []
    for index, run in enumerate(config.runs):
        slot = None if cache is None else cache.length
        context = _Context(config, options, inputs, mask_BT, slot)
        state = None if cache is None else (cache.k[run.name], cache.v[run.name])
        key = None if rng is None else jax.random.fold_in(rng, index)
        layers = params["layers"][run.name]
        walk = _run_split if isinstance(layers, tuple) else _run_scanned
        x_BTD, state, run_stats = walk(layers, x_BTD, state, key, context)
        if state is not None:
            new_k[run.name], new_v[run.name] = state
        if run_stats is not None:
            stats.append(run_stats)
    hidden = rms_norm(x_BTD, params["final_norm"]["scale"], config.norm_eps)
    if cache is not None:
        length = cache.length + tokens_BT.shape[1]
        cache = dataclasses.replace(cache, k=new_k, v=new_v, length=length)
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stats) if stats else None
    return Output(hidden, cache, joined)


def unembed(params: tree.Tree, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D]."""
    if config.tie_embeddings:
        head = params["embed"]["tokens"].astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    head = params["lm_head"]["w"].astype(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def logits(params: tree.Tree, config: ModelConfig, tokens_BT: jax.Array, **kwargs) -> jax.Array:
    """Float32 logits [B, T, V]; keyword arguments as `forward`."""
    return unembed(params, config, forward(params, config, tokens_BT, **kwargs).hidden_BTD)


def split_layers(params: tree.Tree) -> tree.Tree:
    """Cuts every stacked run into a tuple of layers, for decoding without copies of slices."""
    layers = {name: tuple(tree.unstack(run)) for name, run in params["layers"].items()}
    return params | {"layers": layers}


# -- inside ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Context:
    """What every block of a run shares."""

    config: ModelConfig
    options: ForwardOptions
    inputs: AttentionInputs
    mask_BT: jax.Array | None
    slot: jax.Array | None


def _attention_inputs(config, tokens_BT, positions_BT, segment_ids_BT, cache) -> AttentionInputs:
    num_batch, num_tokens = tokens_BT.shape
    index_T = jnp.arange(num_tokens)
    if cache is not None:
        slots_T = cache.length + index_T
        positions_BT = jnp.maximum(slots_T[None, :] - cache.start_B[:, None], 0)
        num_slots = jax.tree.leaves(cache.k)[0].shape[-2]
        slots_S = jnp.arange(num_slots)
        mask = slots_S[None, None, :] <= slots_T[None, :, None]
        mask = mask & (slots_S[None, None, :] >= cache.start_B[:, None, None])
        length = cache.rope_length_B
    else:
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(index_T, (num_batch, num_tokens))
        mask = (index_T[:, None] >= index_T[None, :])[None]
        if segment_ids_BT is not None:
            mask = mask & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
        length = jnp.max(positions_BT, axis=1) + 1
    freqs = frequencies(config.rope, config.head_size, length)
    cos, sin = rotation(positions_BT, freqs)
    mask = jnp.broadcast_to(mask, (num_batch, *mask.shape[1:]))
    return AttentionInputs(cos, sin, mask)


def _block(layer, x_BTD, rng, extend, context: _Context):
    """One pre-norm block: attention, then the feed-forward layer or the experts."""
    config, options = context.config, context.options
    dtype = options.compute_dtype
    # Routers keep their own precision; everything else is computed in compute_dtype.
    cast = tree.map_with_path(
        lambda path, w: w if path.startswith("moe/router") else w.astype(dtype), layer
    )
    normed = rms_norm(x_BTD, cast["attn_norm"]["scale"], config.norm_eps)
    attended, state = mha(cast["attn"], normed, context.inputs, extend)
    x_BTD = x_BTD + attended
    normed = rms_norm(x_BTD, cast["mlp_norm"]["scale"], config.norm_eps)
    activation = ACTIVATION[config.activation]
    if "mlp" in cast:
        return x_BTD + gated_ffn(cast["mlp"], normed, activation), state, None
    assert config.moe is not None
    mixed, stats = moe_layer(
        cast["moe"],
        normed,
        config.moe,
        activation=activation,
        mask_BT=context.mask_BT,
        rng=rng,
        implementation=options.moe_implementation,
    )
    return x_BTD + mixed, state, stats


def _run_scanned(layers, x_BTD, state, rng, context: _Context):
    """Scans a run of stacked layers; the cache rides in the carry, so it is updated in place."""
    num_layers = jax.tree.leaves(layers)[0].shape[0]

    def body(carry, xs):
        x_BTD, state = carry
        layer, index = xs
        key = None if rng is None else jax.random.fold_in(rng, index)

        def extend(k, v):
            if state is None:
                return k, v, None
            assert context.slot is not None
            at = (index, 0, 0, context.slot, 0)
            both = tuple(
                jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), at)
                for old, new in zip(state, (k, v), strict=True)
            )
            seen = (jax.lax.dynamic_index_in_dim(c, index, keepdims=False) for c in both)
            return *(c.astype(k.dtype) for c in seen), both

        x_BTD, new_state, stats = _block(layer, x_BTD, key, extend, context)
        return (x_BTD, new_state), stats

    if context.options.remat != "none":
        body = jax.checkpoint(
            body, policy=REMAT_POLICIES[context.options.remat], prevent_cse=False
        )
    (x_BTD, state), stats = jax.lax.scan(body, (x_BTD, state), (layers, jnp.arange(num_layers)))
    return x_BTD, state, stats


def _run_split(layers, x_BTD, state, rng, context: _Context):
    """Walks a run of split layers one by one, each with cache arrays of its own."""
    new_k, new_v, stats = [], [], []
    for index, layer in enumerate(layers):
        key = None if rng is None else jax.random.fold_in(rng, index)
        extend = functools.partial(_extend_split, state, index, context.slot)
        x_BTD, new, layer_stats = _block(layer, x_BTD, key, extend, context)
        if new is not None:
            new_k.append(new[0])
            new_v.append(new[1])
        stats.append(layer_stats)
    joined = None if stats[0] is None else jax.tree.map(lambda *s: jnp.stack(s), *stats)
    return x_BTD, None if state is None else (tuple(new_k), tuple(new_v)), joined


def _extend_split(state, index, slot, k, v):
    if state is None:
        return k, v, None
    at = (0, 0, slot, 0)
    both = tuple(
        jax.lax.dynamic_update_slice(old[index], new.astype(old[index].dtype), at)
        for old, new in zip(state, (k, v), strict=True)
    )
    return *(c.astype(k.dtype) for c in both), both


# -- Linen shell -----------------------------------------------------------------------------------


class _Params(nn.Module):
    """Declares one dict of parameters, and those below it."""

    spec: Any
    prefix: str
    scale: float

    @nn.compact
    def __call__(self):
        params = {}
        for name, leaf in self.spec.items():
            path = f"{self.prefix}{name}"
            if isinstance(leaf, jax.ShapeDtypeStruct):
                init = functools.partial(init_leaf, path, leaf=leaf, scale=self.scale)
                params[name] = self.param(name, init)
            else:
                params[name] = _Params(leaf, path + "/", self.scale, name=name)()
        return params


class Transformer(nn.Module):
    """Linen shell: ``Transformer(config).init(key, tokens)["params"]`` has `init_params`' tree.

    ``apply({"params": params}, tokens_BT, **kwargs)`` gives what `forward` gives.
    """

    config: ModelConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, **kwargs) -> Output:
        params = {}
        for name, spec in abstract_params(self.config, self.dtype).items():
            params[name] = _Params(spec, name + "/", self.config.initializer_range, name=name)()
        return forward(params, self.config, tokens_BT, **kwargs)
