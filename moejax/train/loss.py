"""Next-token loss on packed batches, without keeping the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions

Batch = Any  # {"tokens", "segment_ids", "positions", "loss_mask"}, each [B, T]
# Float32 logits up to this size are computed at once and kept for the backward pass.
MAX_LOGIT_BYTES = 256 * 2**20
DEFAULT_OPTIONS = ForwardOptions()


def targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What each position predicts: ids [B, T] and float32 weights [B, T].

    Position t predicts token t + 1 if both lie in one segment (0 is padding) and
    ``loss_mask[t + 1]`` says that the token counts; the weight is that mask, else 0.
    """
    tokens, segments = jnp.asarray(batch["tokens"]), jnp.asarray(batch["segment_ids"])
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    weights = jnp.asarray(batch["loss_mask"])[:, 1:].astype(jnp.float32) * same
    pad = ((0, 0), (0, 1))
    return jnp.pad(tokens[:, 1:], pad), jnp.pad(weights, pad)


def token_nll(
    params: tree.Tree,
    config: ModelConfig,
    hidden_BTD: jax.Array,
    target_BT: jax.Array,
    max_logit_bytes: int = MAX_LOGIT_BYTES,
) -> jax.Array:
    """-log softmax(logits)[target] as float32 [B, T], in nats; memory as `token_losses`."""
    return token_losses(params, config, hidden_BTD, target_BT, max_logit_bytes)[0]


def token_losses(
    params: tree.Tree,
    config: ModelConfig,
    hidden_BTD: jax.Array,
    target_BT: jax.Array,
    max_logit_bytes: int = MAX_LOGIT_BYTES,
) -> tuple[jax.Array, jax.Array]:
    """log Z - logits[target] and log Z = logsumexp(logits), each float32 [B, T].

    Time is cut into chunks whose logits fit in `max_logit_bytes`; a chunk's logits are computed
    again in the backward pass (one more product with the head) and are never kept, so the logits
    of the whole batch exist at no time.
    """

    def nll(hidden, target):
        logits = transformer.unembed(params, config, hidden)
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        return log_z - picked, log_z

    num_batch, num_tokens = target_BT.shape
    row_bytes = 4 * num_batch * config.vocab_size
    chunk = max(1, max_logit_bytes // row_bytes)
    if chunk >= num_tokens:
        return nll(hidden_BTD, target_BT)
    num_chunks = -(-num_tokens // chunk)
    chunk = -(-num_tokens // num_chunks)
    pad = num_chunks * chunk - num_tokens

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(num_batch, num_chunks, chunk, *x.shape[2:]), 1, 0)

    pieces = jax.lax.map(
        lambda xs: jax.checkpoint(nll, prevent_cse=False)(*xs), (cut(hidden_BTD), cut(target_BT))
    )
    nll_BT, log_z_BT = (
        jnp.moveaxis(piece, 0, 1).reshape(num_batch, -1)[:, :num_tokens] for piece in pieces
    )
    return nll_BT, log_z_BT


def lm_loss(
    params: tree.Tree,
    config: ModelConfig,
    batch: Batch,
    rng: jax.Array | None = None,
    options: ForwardOptions = DEFAULT_OPTIONS,
    max_logit_bytes: int = MAX_LOGIT_BYTES,
    z_weight: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean nll of the counted tokens, plus for an MoE the router's losses summed over layers.

    With z_weight also z_weight times the mean of (log Z)^2 over those tokens, which keeps the
    softmax's normaliser near 1 (PaLM, arXiv 2204.02311, section 5).

    metrics: nll; target_count (tokens counted), token_count (tokens that are not padding);
    logit_z_loss with z_weight; for an MoE also balance_loss, shared_weight and expert_count [L, J],
    tokens per routed expert, and z_loss where the router has one.
    """
    output = _forward(params, config, batch, rng, options)
    # Gathered here, once, and not in every chunk.
    head = transformer.outer_at_use(params, options)
    memory = _on_all_devices(max_logit_bytes, options)
    target_BT, weight_BT = targets(batch)
    nll_BT, log_z_BT = token_losses(head, config, output.hidden_BTD, target_BT, memory)
    count = jnp.sum(weight_BT)
    nll = jnp.sum(nll_BT * weight_BT) / jnp.maximum(count, 1.0)
    loss, metrics = nll, {"nll": nll, "target_count": count}
    if z_weight:
        square = jnp.sum(jnp.square(log_z_BT) * weight_BT) / jnp.maximum(count, 1.0)
        metrics["logit_z_loss"] = z_weight * square
        loss += metrics["logit_z_loss"]
    metrics["token_count"] = jnp.sum(jnp.asarray(batch["segment_ids"]) > 0)
    if output.stats is None or config.moe is None:
        return loss, metrics
    balance_loss = jnp.sum(output.stats.balance_loss)
    metrics["balance_loss"] = balance_loss
    metrics["shared_weight"] = jnp.mean(output.stats.shared_weight)
    metrics["expert_count"] = output.stats.counts_E[:, config.moe.num_shared :]
    loss += balance_loss
    if config.moe.z_weight:
        metrics["z_loss"] = jnp.sum(output.stats.z_loss)
        loss += metrics["z_loss"]
    return loss, metrics


def example_nll(
    params: tree.Tree,
    config: ModelConfig,
    batch: Batch,
    *,
    num_segments: int | None = None,
    options: ForwardOptions = DEFAULT_OPTIONS,
    max_logit_bytes: int = MAX_LOGIT_BYTES,
) -> tuple[jax.Array, jax.Array]:
    """Per example: sums of nll and counts of the counted tokens, each float32 [B, num_segments].

    Column s is segment id s + 1 of the row; absent segments are zeros. Under jit give
    `num_segments`; outside, the batch's own largest id is taken. max_logit_bytes: per device.
    """
    if num_segments is None:
        num_segments = max(1, int(np.max(batch["segment_ids"])))
    output = _forward(params, config, batch, None, options)
    target_BT, weight_BT = targets(batch)
    memory = _on_all_devices(max_logit_bytes, options)
    nll_BT = token_nll(params, config, output.hidden_BTD, target_BT, memory)
    ids_S = jnp.arange(1, num_segments + 1)
    member_BTS = (jnp.asarray(batch["segment_ids"])[..., None] == ids_S).astype(jnp.float32)
    sums = jnp.einsum("bt,bts->bs", nll_BT * weight_BT, member_BTS)
    return sums, jnp.einsum("bt,bts->bs", weight_BT, member_BTS)


def _on_all_devices(num_bytes: int, options: ForwardOptions) -> int:
    """Of logits that are split: each device holds its part."""
    return num_bytes * (1 if options.mesh is None else options.mesh.size)


def _forward(params, config, batch, rng, options) -> transformer.Output:
    return transformer.forward(
        params,
        config,
        jnp.asarray(batch["tokens"]),
        positions_BT=jnp.asarray(batch["positions"]),
        segment_ids_BT=jnp.asarray(batch["segment_ids"]),
        rng=rng,
        options=options,
    )
