"""What asks a router for an even load, and for small logits; padding counts in none of it.

With J routed experts, K per token, n tokens that count, counts c_i (tokens that chose i; they have
no gradient) and scores as probabilities p_ti:

    switch      J / (K n^2) * sum_i c_i sum_t p_ti     Switch eq. 4 (arXiv 2101.03961) for any K
    sequence    the same for each row of the batch, averaged over rows that hold a token
                (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20)
    pooled      K times switch of the tokens of all layers as one batch (`pooled_balance`)
    cv_squared  CV^2(importance) + CV^2(load)          Shazeer et al. 2017, eq. 7 and 11
    z           mean_t logsumexp(z_t)^2                ST-MoE, arXiv 2202.08906, eq. 5

switch and sequence are 1 for an even router, whatever J and K; pooled is K. It is Hugging Face's
`load_balancing_loss_func` (Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE): with L layers of n tokens

    J / (L n)^2 * sum_i (sum_l c_li) (sum_lt p_lti)

while switch, summed over layers, is J / (K n^2) * sum_l sum_i c_li sum_t p_lti: the two are K / L
times one another where layers choose alike, and not in general. Hugging Face always takes softmax
probabilities of clean logits; here they are the router's own scores.

On a mesh `axis_names` are the axes that tokens are split over: "global" sums c, p and n over them
first (the global-batch loss of arXiv 2501.11873), "local" averages each device's own loss.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.moe.config import MoEConfig
from moejax.moe.scores import Logits

AxisNames = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What every loss needs: keep_N is 1.0 where a token counts; rows are num_sequences of them."""

    keep_N: jax.Array
    num_sequences: int
    axis_names: AxisNames


def balance_loss(
    probs_NJ: jax.Array,
    chosen_NJ: jax.Array,
    importance_J: jax.Array,
    load_J: jax.Array,
    batch: Batch,
    config: MoEConfig,
) -> jax.Array:
    """The configured balance loss, before its weight: a scalar, equal on all devices.

    probs_NJ: scores as probabilities; chosen_NJ: 1.0 where a token chose an expert;
    importance_J, load_J: this device's sums, which only "cv_squared" reads.
    """
    keep_N, names = batch.keep_N, batch.axis_names
    if config.balance == "none":
        return jnp.zeros((), jnp.float32)
    k = config.routed_per_token
    if config.balance == "sequence":
        return _sequence_balance(probs_NJ, chosen_NJ, batch, k)
    among = names if config.balance_scope == "global" or config.balance == "pooled" else ()
    if config.balance == "cv_squared":
        loss = cv_squared(total(importance_J, among)) + cv_squared(total(load_J, among))
    else:
        counts_J = total(masked_sum(chosen_NJ, keep_N), among)
        prob_sums_J = total(masked_sum(probs_NJ, keep_N), among)
        k = 1 if config.balance == "pooled" else k  # which is that of a single layer, here
        loss = switch_balance(counts_J, prob_sums_J, total(keep_N.sum(), among), k)
    return jax.lax.pmean(loss, names) if names and not among else loss


def switch_balance(
    counts_J: jax.Array, prob_sums_J: jax.Array, num_tokens: jax.Array, k: int
) -> jax.Array:
    """J / (K n^2) * sum_i counts_i prob_sums_i over the last dim; 0 without tokens."""
    scale = counts_J.shape[-1] / (k * jnp.maximum(num_tokens, 1.0) ** 2)
    return scale * jnp.sum(jax.lax.stop_gradient(counts_J) * prob_sums_J, axis=-1)


def pooled_balance(counts_LJ: jax.Array, prob_sums_LJ: jax.Array, config: MoEConfig) -> jax.Array:
    """balance_weight * J / N^2 * sum_i (sum_l counts) (sum_l prob_sums), N tokens of all layers."""
    counts_J = counts_LJ.sum(axis=0)
    num_tokens = jax.lax.stop_gradient(counts_J.sum()) / config.routed_per_token
    loss = switch_balance(counts_J, prob_sums_LJ.sum(axis=0), num_tokens, 1)
    return config.balance_weight * loss


def cv_squared(values: jax.Array) -> jax.Array:
    """Squared coefficient of variation, var(v) / (mean(v)^2 + 1e-10) with the unbiased variance.

    Zero for a single value, where there is nothing to balance.
    """
    if values.shape[0] == 1:
        return jnp.zeros((), jnp.float32)
    values = values.astype(jnp.float32)
    return jnp.var(values, ddof=1) / (jnp.mean(values) ** 2 + 1e-10)


def z_loss(logits_NJ: jax.Array, batch: Batch) -> jax.Array:
    """Mean over tokens of logsumexp(z)^2, before its weight."""
    squares_N = jax.nn.logsumexp(logits_NJ, axis=1) ** 2
    return mean(squares_N, batch.keep_N, batch.axis_names)


def noisy_load(logits: Logits, keep_N: jax.Array, config: MoEConfig) -> jax.Array:
    """Expected tokens per expert if an expert's own noise were drawn again (eq. 8 to 10); [J]."""
    assert logits.std_NJ is not None
    # The threshold to beat is the k-th largest of the other experts' noisy logits: the (k+1)-th of
    # all for a chosen expert, the k-th for the rest.
    k = config.routed_per_token
    largest = jax.lax.top_k(logits.noisy_NJ, k + 1)[0]
    to_stay_N1, to_enter_N1 = largest[:, k, None], largest[:, k - 1, None]
    compared = logits.noisy_NJ
    if config.load_estimator == "noise_term":
        compared = compared - logits.clean_NJ
    threshold_NJ = jnp.where(compared > to_stay_N1, to_stay_N1, to_enter_N1)
    prob_NJ = jax.scipy.stats.norm.cdf((logits.clean_NJ - threshold_NJ) / logits.std_NJ)
    return masked_sum(prob_NJ, keep_N)


def masked_sum(values_NJ: jax.Array, keep_N: jax.Array) -> jax.Array:
    """Sum over the tokens that count. No matmul: a TPU would round its operands to bfloat16."""
    return jnp.sum(values_NJ * keep_N[:, None], axis=0)


def total(value: jax.Array, axis_names: AxisNames) -> jax.Array:
    """Sum over the devices along these mesh axes; inside shard_map, or with none anywhere."""
    return jax.lax.psum(value, axis_names) if axis_names else value


def mean(values_N: jax.Array, keep_N: jax.Array, axis_names: AxisNames = ()) -> jax.Array:
    """Mean of the values that count, over all devices; 0 if none does."""
    count = jnp.maximum(total(keep_N.sum(), axis_names), 1.0)
    return total((values_N * keep_N).sum(), axis_names) / count


def _sequence_balance(probs_NJ: jax.Array, chosen_NJ: jax.Array, batch: Batch, k: int) -> jax.Array:
    num_routed = probs_NJ.shape[1]
    keep_BT = batch.keep_N.reshape(batch.num_sequences, -1)
    by_row = (batch.num_sequences, -1, num_routed)
    sum_rows = jax.vmap(masked_sum)
    counts_BJ = sum_rows(chosen_NJ.reshape(by_row), keep_BT)
    sums_BJ = sum_rows(probs_NJ.reshape(by_row), keep_BT)
    length_B = keep_BT.sum(axis=1)
    losses_B = switch_balance(counts_BJ, sums_BJ, length_B, k)
    return mean(losses_B, (length_B > 0).astype(jnp.float32), batch.axis_names)
