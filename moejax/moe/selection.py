"""Who goes where: each token's experts, or each expert's tokens."""

import math

import jax
import jax.numpy as jnp

from moejax.moe.config import MoEConfig


def choose_experts(
    logits_NJ: jax.Array,
    scores_NJ: jax.Array,
    bias_J: jax.Array | None,
    config: MoEConfig,
) -> jax.Array:
    """Each token's `routed_per_token` best experts, best first, as int32 [N, K].

    By score plus bias_J (no gradient) where there is one, within the best groups where there are
    groups. Equal values go to the lower index.
    """
    # softmax and sigmoid keep the order of logits, and round apart logits to equal scores.
    by_score = bias_J is not None or (config.num_groups > 1 and config.group_score == "top2_sum")
    choice_NJ = jax.lax.stop_gradient(scores_NJ if by_score else logits_NJ)
    if bias_J is not None:
        choice_NJ = choice_NJ + jax.lax.stop_gradient(bias_J.astype(jnp.float32))
    if config.num_groups > 1:
        choice_NJ = limit_groups(choice_NJ, config)
    return jax.lax.top_k(choice_NJ, config.routed_per_token)[1].astype(jnp.int32)


def limit_groups(choice_NJ: jax.Array, config: MoEConfig) -> jax.Array:
    """-inf outside each token's `top_groups` best of `num_groups` groups of neighbouring experts.

    A group is as good as its best expert (DeepSeek-V2, arXiv 2405.04434, section 2.2.2) or the sum
    of its two best (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """
    num_tokens, num_groups = choice_NJ.shape[0], config.num_groups
    grouped = choice_NJ.reshape(num_tokens, num_groups, -1)
    if config.group_score == "max":
        value = grouped.max(axis=2)
    else:
        value = jax.lax.top_k(grouped, 2)[0].sum(axis=2)
    best = jax.lax.top_k(value, config.top_groups)[1]
    kept = jax.nn.one_hot(best, num_groups, dtype=jnp.int32).sum(axis=1) > 0
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(choice_NJ.shape)


def tokens_per_expert(num_tokens: int, config: MoEConfig) -> int:
    """Tokens that an expert takes of a row of T: ceil(capacity_factor * top_k * T / J), at most T.

    (Expert choice, arXiv 2202.09368, eq. 1, whose capacity factor is capacity_factor * top_k here.)
    """
    wanted = config.capacity_factor * config.top_k * num_tokens / config.num_routed
    return min(num_tokens, math.ceil(wanted))


def choose_tokens(
    scores_NJ: jax.Array, keep_N: jax.Array, num_sequences: int, config: MoEConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each expert's best tokens of each row, as (tokens_M, experts_M, scores_M).

    Expert choice (Zhou et al. 2022, arXiv 2202.09368, eq. 2). M = rows * J * tokens_per_expert.
    keep_N is 0 for padding, which is taken last, with score 0.

    NOT CAUSAL: whether a token is taken depends on the later tokens of its row, so a decoder
    trained so sees the future, and generates with experts that training did not choose. For
    encoders, and for judging routers. Rows of a batch do not affect each other (the paper pools
    them), so that a batch cut over devices gives what the whole one gives; but the tokens taken
    are a share of the row's length, padding included.
    """
    num_tokens, num_routed = scores_NJ.shape
    row = num_tokens // num_sequences
    count = tokens_per_expert(row, config)
    masked_NJ = jnp.where(keep_N[:, None] > 0, scores_NJ, -1.0)
    masked_BJT = masked_NJ.reshape(num_sequences, row, num_routed).transpose(0, 2, 1)
    best, index = jax.lax.top_k(masked_BJT, count)
    tokens = index + row * jnp.arange(num_sequences)[:, None, None]
    experts = jnp.broadcast_to(jnp.arange(num_routed)[None, :, None], tokens.shape)
    flat = tokens.reshape(-1).astype(jnp.int32), experts.reshape(-1).astype(jnp.int32)
    return *flat, jnp.maximum(best, 0.0).reshape(-1)


def update_selection_bias(bias_J: jax.Array, counts_J: jax.Array, rate: float) -> jax.Array:
    """b_i + rate * sign(mean(counts) - counts_i): the auxiliary-loss-free rule, after each step.

    (Wang et al. 2024, arXiv 2408.15664, algorithm 1; DeepSeek-V3 has rate 0.001.) counts_J: tokens
    per routed expert of the whole batch, `MoEStats.counts_E`. Leading dims, as of stacked layers,
    are kept apart.
    """
    counts_J = counts_J.astype(jnp.float32)
    error_J = counts_J.mean(axis=-1, keepdims=True) - counts_J
    return bias_J + jnp.asarray(rate, bias_J.dtype) * jnp.sign(error_J).astype(bias_J.dtype)
