"""The only decoder: pure functions over one parameter tree (`linen.py` has a Linen shell).

The tree is documented in `abstract_params`. Every function takes ``(params, config, ...)``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.sharding import at_use
from moejax.models.adapted import adapted
from moejax.models.attend import local_shape
from moejax.models.cache import KVCache, PagedCache, extend_split
from moejax.models.config import ModelConfig
from moejax.models.inserted import Inserted, changed, composed
from moejax.models.layers import ACTIVATION, feed_forward, norm
from moejax.models.mha import AttentionInputs, mha
from moejax.models.mla import mla
from moejax.models.options import BLOCK_INPUT, ForwardOptions
from moejax.models.params import abstract_params, init_leaf, init_params
from moejax.models.sparse import sparse_mha
from moejax.models.sparse_mla import sparse_mla
from moejax.moe.changed import changed_moe
from moejax.moe.expert_parallel import split_rows, whole_columns
from moejax.moe.layer import MoEStats, moe_layer
from moejax.moe.losses import pooled_balance
from moejax.moe.sparse import sparse_moe
from moejax.ops import by_rows
from moejax.ops.attention import AttentionSpec, Visible, Window, cudnn_can, shared_mask, soft_capped
from moejax.ops.rope import frequencies, rotation
from moejax.ops.wide_product import wide_product

__all__ = ["abstract_params", "init_leaf", "init_params"]  # of the tree, from params.py
__all__ += ["ForwardOptions", "Inserted", "Output", "forward", "logits"]
__all__ += ["outer_at_use", "split_layers", "unembed"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """hidden_BTD after the final norm; the cache, if one was given; router statistics [L, ...];
    what rode along, and what was seen of places inside (`moejax.models.inserted.Inserted`)."""

    hidden_BTD: jax.Array
    cache: KVCache | PagedCache | None
    stats: MoEStats | None
    kept: Any = None
    seen: Any = None


def forward(
    params: tree.Tree,
    config: ModelConfig,
    tokens_BT: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    cache: KVCache | PagedCache | None = None,
    rng: jax.Array | None = None,
    options: ForwardOptions = ForwardOptions(),
    inserted: Inserted | None = None,
) -> Output:
    """Runs the decoder.

    Args:
      params: the tree of `abstract_params`, or of `split_layers`.
      config: the model.
      tokens_BT: int32 ids.
      positions_BT: int32; by default a token's index in its row. With a cache they follow from it.
      segment_ids_BT: int32; tokens see earlier tokens of their own segment only, 0 is padding.
      cache: continue from these keys and values; T new slots are filled. One in pages needs split
        layers.
      rng: key for the routers' exploration noise; None (evaluation) adds none.
      options: how to compute.
      inserted: functions run before the first block, inside every one, and after it.

    Returns:
      hidden states after the final norm, the extended cache, router statistics.

    With "dynamic" rope a row's frequencies follow its longest position (with a cache: its
    `rope_length_B`), so packed rows share those of their longest segment.
    """
    positions_BT = _positions(config, tokens_BT, positions_BT, cache)
    inputs = _attention_inputs(config, options, positions_BT, segment_ids_BT, cache)
    mask_BT = None if segment_ids_BT is None else segment_ids_BT > 0
    slot: Any = None
    if isinstance(cache, PagedCache):
        mask_BT, slot = cache.mask(tokens_BT.shape[1]), cache.places(tokens_BT.shape[1])
    elif cache is not None:
        slot = cache.length
        slots = cache.length + jnp.arange(tokens_BT.shape[1])
        mask_BT = slots[None, :] >= cache.start_B[:, None]
    params = outer_at_use(params, options)
    embed = params["embed"]
    if options.parallel is not None:
        # Also its gradient is first whole: scattering rows with D split would gather every token.
        embed = whole_columns(embed, options.parallel.mesh)
    inserted = inserted or Inserted()
    x_BTD = _embed(embed, config, tokens_BT, positions_BT, options.compute_dtype, inserted)
    if options.parallel is not None:
        x_BTD = split_rows(x_BTD, options.parallel.mesh)
    new_k, new_v, stats, seen, kept, first = {}, {}, [], {}, inserted.kept, 0
    for index, run in enumerate(config.runs):
        context = _Context(config, options, inputs, mask_BT, slot, run.windows, inserted, first)
        first += run.num_layers
        state = None if cache is None else (cache.k[run.name], cache.v[run.name])
        key, layers = _folded(rng, index), params["layers"][run.name]
        walk = _run_split if isinstance(layers, tuple) else _run_scanned
        both, flow = (layers, inserted.of_run(run.name)), (x_BTD, kept)
        flow, state, (run_stats, seen[run.name]) = walk(both, flow, state, key, context)
        x_BTD, kept = flow
        if state is not None:
            new_k[run.name], new_v[run.name] = state
        if run_stats is not None:
            stats.append(run_stats)
    hidden = x_BTD
    if config.norms.final:
        hidden = norm(config.norms.kind, params.get("final_norm", {}), x_BTD, config.norm_eps)
    if isinstance(cache, PagedCache):
        length_B = cache.length_B + cache.valid_B
        cache = dataclasses.replace(cache, k=new_k, v=new_v, length_B=length_B)
    elif cache is not None:
        length = cache.length + tokens_BT.shape[1]
        cache = dataclasses.replace(cache, k=new_k, v=new_v, length=length)
    return Output(hidden, cache, _joined(stats, config) if stats else None, kept, seen)


def outer_at_use(params: tree.Tree, options: ForwardOptions) -> tree.Tree:
    """On a mesh, the weights that belong to no block as they are used; else what was given."""
    if options.parallel is None:
        return params
    return tree.map_with_path(
        lambda path, w: w if path.startswith("layers/") else _cast(path, w, options), params
    )


def unembed(params: tree.Tree, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D]."""
    embed = params["embed"]
    if config.embedding.size is not None:
        hidden = hidden @ embed["w_out"].astype(hidden.dtype)
    if config.tie_embeddings:
        head, form = embed["tokens"], "...d,vd->...v"
    else:
        head, form = params["lm_head"]["w"], "...d,dv->...v"
    product = functools.partial(by_rows.einsum, form)
    found = wide_product(product, hidden, head.astype(hidden.dtype))
    return soft_capped(found, config.embedding.logit_soft_cap)


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
    """What every block of a run shares.

    slot: where new keys go (of pages: page and slot). first: its first block's number in the model.
    """

    config: ModelConfig
    options: ForwardOptions
    inputs: AttentionInputs
    mask_BT: jax.Array | None
    slot: Any
    windows: tuple[int, ...]
    inserted: Inserted
    first: int

    def after(self, index: Any, x_BTD: jax.Array, kept: Any) -> tuple[jax.Array, Any]:
        """What follows block `index` of the run."""
        if self.inserted.after is None:
            return x_BTD, kept
        return self.inserted.after(self.first + index, x_BTD, kept)


def _folded(rng: jax.Array | None, index: Any) -> jax.Array | None:
    return None if rng is None else jax.random.fold_in(rng, index)


def _joined(stats: list[MoEStats], config: ModelConfig) -> MoEStats:
    """The layers' statistics; of a balance loss of all layers together each has an equal part."""
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stats)
    assert config.moe is not None
    if config.moe.balance != "pooled":
        return joined
    counts_LJ = joined.counts_E[:, config.moe.num_shared :]
    loss = pooled_balance(counts_LJ, joined.prob_sums_J, config.moe)
    parts_L = jnp.full(len(counts_LJ), 1 / len(counts_LJ)) * loss
    return dataclasses.replace(joined, balance_loss=parts_L)


def _positions(config, tokens_BT, positions_BT, cache) -> jax.Array:
    num_batch, num_tokens = tokens_BT.shape
    if isinstance(cache, PagedCache):
        return cache.positions(num_tokens)
    if cache is not None:
        slots_T = cache.length + jnp.arange(num_tokens)
        return jnp.maximum(slots_T[None, :] - cache.start_B[:, None], 0)
    if positions_BT is not None:
        return positions_BT
    if config.embedding.positions == "learned" and num_tokens > config.max_position:
        raise InputError(
            f"a text of {num_tokens} tokens, but the model has learned {config.max_position} "
            "positions: cut it"
        )
    return jnp.broadcast_to(jnp.arange(num_tokens), (num_batch, num_tokens))


def _embed(embed, config: ModelConfig, tokens_BT, positions_BT, dtype, inserted) -> jax.Array:
    """What enters the first block, [B, T, D]."""
    x = embed["tokens"][tokens_BT].astype(dtype)
    if config.embedding.scaled:
        x = x * jnp.asarray(config.d_model**0.5, dtype)
    if config.embedding.size is not None:
        x = x @ embed["w_in"].astype(dtype)
    if inserted.before is not None:
        x = inserted.before(x)
    if config.embedding.positions == "learned":
        rows_BT = positions_BT + config.embedding.position_offset
        x = x + embed["positions"][rows_BT].astype(dtype)
    return x


def _attention_inputs(config, options, positions_BT, segment_ids_BT, cache) -> AttentionInputs:
    if isinstance(cache, PagedCache):
        length, num_keys = cache.rope_length_B, cache.page_size
        visible = Visible(slot=cache.length_B, pages_BP=cache.pages_BP)
    elif cache is not None:
        length = cache.rope_length_B
        visible = Visible(slot=cache.length, start_B=cache.start_B)
        num_keys = jax.tree.leaves(cache.k)[0].shape[-2]
    else:
        length = jnp.max(positions_BT, axis=1) + 1
        visible = Visible(segments_BT=segment_ids_BT)
        num_keys = positions_BT.shape[1]
    turn = None
    if config.embedding.positions == "rope":
        freqs = frequencies(config.rope, config.rope_size, length)
        turn = rotation(positions_BT, freqs, config.rope.amplitude)
    kind = config.attention
    value_size = config.head_size if config.mla is None else config.mla.v_size
    fused = cudnn_can(config.head_size, value_size, options.compute_dtype, kind.soft_cap)
    spec = AttentionSpec(kind.scale, kind.soft_cap, kind.windows, options.attention, fused)
    shape = (*positions_BT.shape, config.num_heads)
    mesh = None if options.parallel is None or cache is not None else options.parallel.mesh
    if mesh is None:
        visible, spec = shared_mask(visible, spec, shape, num_keys)
    else:
        shape = local_shape(shape, config.num_kv_heads, mesh.shape)
        visible, spec = shared_mask(visible, spec, shape, num_keys, num_devices=1)
    return AttentionInputs(turn, visible, spec, config.norm_eps, kind.clip, mesh)


def _block(layer, x_BTD, rng, extend, context: _Context, window: Window):
    """One block: attention, then the feed-forward layer or the experts, each with its norms.

    layer: its weights, and its part of `Inserted.layers`. Returns the output, `extend`'s new state,
    and (router statistics, what was seen at the places of `Inserted`).
    """
    config, options = context.config, context.options
    layer, part = layer
    at, seen = context.inserted.inside(part)
    on_heads, on_neurons, on_gate = at("heads"), at("neurons"), at("gate")
    activation = ACTIVATION[config.activation]
    cast = tree.map_with_path(lambda path, w: _cast(path, w, options), adapted(layer))

    def attend(x):
        x = changed(at("attn_in"), x)
        if config.mla is not None:
            latent = sparse_mla if "rows_q" in cast["attn"] else mla
            return latent(config.mla, cast["attn"], x, context.inputs, extend, window, on_heads)
        heads = sparse_mha if "rows_q" in cast["attn"] else mha
        return heads(cast["attn"], x, context.inputs, extend, window, on_heads)

    def feed(x):
        x = changed(at("mlp_in"), x)
        if "mlp" in cast:
            return feed_forward(cast["mlp"], x, composed(activation, on_gate), on_neurons), None
        assert config.moe is not None
        how: dict[str, Any] = {"activation": activation, "rng": rng}
        how |= {"mask_BT": context.mask_BT, "trace": options.trace_routing}
        how |= {"parallel": options.travel}
        if "rows_up" in cast["moe"]["experts"]:
            return sparse_moe(cast["moe"], x, config.moe, **how)
        if on_neurons is not None or on_gate is not None:
            return changed_moe(cast["moe"], x, config.moe, (on_gate, on_neurons), **how)
        how["implementation"] = options.moe_implementation
        return moe_layer(cast["moe"], x, config.moe, **how)

    x_BTD, state = _residual(cast, "attn", x_BTD, attend, config)
    x_BTD, stats = _residual(cast, "mlp", x_BTD, feed, config)
    return x_BTD, state, (stats, seen)


def _cast(path: str, w: jax.Array, options: ForwardOptions) -> jax.Array:
    """A weight in the dtype of the arithmetic (routers keep theirs) and, on a mesh, at its use.

    What is gathered is gathered in that dtype. The MoE layer places its own weights.
    """
    if path.startswith("moe/router") or not jnp.issubdtype(w.dtype, jnp.floating):
        return w
    w = w.astype(options.compute_dtype)
    if options.parallel is None or path.startswith("moe/"):
        return w
    return at_use(path, w, options.parallel.mesh)


def _residual(layer, name: str, x_BTD, branch, config: ModelConfig):
    """x plus a branch of it, with the norms where `NormConfig.placement` has them."""

    def normed(which, x):
        return norm(config.norms.kind, layer.get(which, {}), x, config.norm_eps)

    if config.norms.placement == "post":
        y_BTD, rest = branch(x_BTD)
        return normed(f"{name}_norm", x_BTD + y_BTD), rest
    y_BTD, rest = branch(normed(f"{name}_norm", x_BTD))
    if config.norms.placement == "sandwich":
        y_BTD = normed(f"{name}_post_norm", y_BTD)
    return x_BTD + y_BTD, rest


def _run_scanned(layers, flow, state, rng, context: _Context):
    """Scans a run of stacked layers; the cache rides in the carry, so it is updated in place.

    layers: weights and parts of `Inserted.layers`. flow: x_BTD and what rides along.
    """
    num_layers = jax.tree.leaves(layers)[0].shape[0]
    # One window is a constant of the program; several ride along with the layers.
    same = len(set(context.windows)) == 1
    windows = None if same else jnp.asarray(context.windows, jnp.int32)

    def body(carry, xs):
        (x_BTD, kept), state = carry
        if context.options.parallel is not None:
            x_BTD = split_rows(x_BTD, context.options.parallel.mesh)
        x_BTD = checkpoint_name(x_BTD, BLOCK_INPUT)
        layer, index, window = xs
        key = _folded(rng, index)

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

        window = context.windows[0] if same else window
        x_BTD, new_state, found = _block(layer, x_BTD, key, extend, context, window)
        return (context.after(index, x_BTD, kept), new_state), found

    if (policy := context.options.policy) is not None:
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    xs = (layers, jnp.arange(num_layers), windows)
    (flow, state), found = jax.lax.scan(body, (flow, state), xs)
    return flow, state, found


def _run_split(layers, flow, state, rng, context: _Context):
    """Walks a run of split layers one by one, each with cache arrays of its own."""
    (x_BTD, kept), new_k, new_v, found = flow, [], [], []
    layers, parts = layers
    for index, weights in enumerate(layers):
        layer = weights, jax.tree.map(lambda x, at=index: x[at], parts)
        key = _folded(rng, index)
        extend = functools.partial(extend_split, state, index, context.slot)
        window = context.windows[index]
        x_BTD, new, of_layer = _block(layer, x_BTD, key, extend, context, window)
        x_BTD, kept = context.after(index, x_BTD, kept)
        if new is not None:
            new_k.append(new[0])
            new_v.append(new[1])
        found.append(of_layer)
    joined = jax.tree.map(lambda *s: jnp.stack(s), *found)
    return (x_BTD, kept), None if state is None else (tuple(new_k), tuple(new_v)), joined
