"""The router: which experts a token gets, with what weights, and how evenly they are used.

logits and scores (`moejax.moe.scores`) -> choice (`moejax.moe.selection`) -> weights (here) ->
losses (`moejax.moe.losses`), all float32, in one `Routing` record.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.moe.config import MoEConfig
from moejax.moe.losses import (
    AxisNames,
    Batch,
    balance_loss,
    masked_sum,
    mean,
    noisy_load,
    total,
    z_loss,
)
from moejax.moe.scores import Logits, probabilities, router_logits, scores
from moejax.moe.selection import choose_experts, choose_tokens
from moejax.ops.kept import ROUTING, keep

ROUTER_STDDEV = 0.02


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The router's decision; J is the number of routed experts, K those per token.

    experts_NK: int32 ids in the layer's numbering, where a shared expert is 0.
    weights_NK: float32 weights of those.
    token_N: None where row n of these two is token n, as in every top-k. Under expert choice, where
        tokens have differing numbers of experts, a row is one (token, expert) pair: K = 1, and
        token_N is its token. Gather tokens by it before dispatch, add rows up by it afterwards.
    shared_weight_N: float32 weight of the shared expert for each token; None when there is none.
    scores_NK: float32 scores of the chosen before any weighting: parts of a softmax over all routed
        experts, or sigmoids.
    importance_J, load_J: the quantities whose evenness "cv_squared" asks for, of this device.

    The rest are float32, over the tokens that count, of all devices along `axis_names`:
    counts_E: tokens per expert (the shared one gets them all).
    prob_sums_J: sums of the scores as probabilities.
    balance_loss, z_loss: times their weights.
    shared_weight: mean of shared_weight_N, 0 without a shared expert.
    dropped: share of tokens that no expert took; 0 in every top-k.
    """

    experts_NK: jax.Array
    weights_NK: jax.Array
    token_N: jax.Array | None
    shared_weight_N: jax.Array | None
    scores_NK: jax.Array
    importance_J: jax.Array
    load_J: jax.Array
    counts_E: jax.Array
    prob_sums_J: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array
    shared_weight: jax.Array
    dropped: jax.Array

    def dense_weights(self, num_tokens: int, num_experts: int) -> jax.Array:
        """The weights as a matrix [num_tokens, num_experts], zero where an expert is not used."""
        chosen_NKE = jax.nn.one_hot(self.experts_NK, num_experts, dtype=jnp.float32)
        weights_NE = jnp.sum(chosen_NKE * self.weights_NK[:, :, None], axis=1)
        if self.token_N is not None:
            weights_NE = jax.ops.segment_sum(weights_NE, self.token_N, num_tokens)
        if self.shared_weight_N is not None:
            weights_NE = weights_NE.at[:, 0].set(self.shared_weight_N)
        return weights_NE


def abstract_router(d_model: int, config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """The router's parameters as name -> shape."""
    num_routed = config.num_routed
    shapes: dict[str, tuple[int, ...]]
    if config.gate == "mlp":
        shapes = {"w_hidden": (d_model, num_routed), "w_out": (num_routed, num_routed)}
    else:
        shapes = {"w_out": (d_model, num_routed)}
    if config.noise:
        shapes["w_noise"] = (d_model, num_routed)
    if config.selection_bias:
        shapes["b_select"] = (num_routed,)
    return shapes


def init_router(
    key: jax.Array, d_model: int, config: MoEConfig, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, jax.Array]:
    """A fresh router: N(0, 0.02) for the gate, zeros for the noise matrix and the selection bias.

    With zeros the noise starts at softplus(0) + 0.01 = 0.70, far above the first logits, so early
    routing is nearly uniform; that is what lets equal experts drift apart. b_select is float32
    whatever dtype is: its steps are 0.001.
    """
    shapes = abstract_router(d_model, config)
    keys = jax.random.split(key, len(shapes))
    router = {}
    for k, (name, shape) in zip(keys, shapes.items(), strict=True):
        if name == "b_select":
            router[name] = jnp.zeros(shape, jnp.float32)
        elif name == "w_noise":
            router[name] = jnp.zeros(shape, dtype)
        else:
            router[name] = (ROUTER_STDDEV * jax.random.normal(k, shape)).astype(dtype)
    return router


def route(
    params: dict[str, jax.Array],
    x_ND: jax.Array,
    config: MoEConfig,
    *,
    mask_N: jax.Array | None = None,
    rng: jax.Array | None = None,
    num_sequences: int = 1,
    axis_names: AxisNames = (),
) -> Routing:
    """Chooses experts for each token (or tokens for each expert) and weighs them.

    z = gate(x), perturbed in training (that is when rng is given);  s = softmax(z) or sigmoid(z)
    T = the chosen experts of a token;  s_max = max s;  everything times `scale`
      scores        g_i = s_i  (OLMoE, Qwen2-MoE, DeepSeek-V2)
      renormalized  g_i = s_i / sum_T s  (Mixtral, Qwen3-MoE, DeepSeek-V3)
      selected      g_i = softmax_T(z)_i  (arXiv 2212.05055; `renormalized` softmax, said otherwise)
      normalized    g_i = s_max softmax_T(s)_i (a second softmax, of probabilities), g_0 = 1 - s_max
      unnormalized  g_i = s_i,                                                       g_0 = 1 - s_max
    The last two are XFT's code (and issue 4 there for 1 - s_max); g_0 is the shared expert's.

    mask_N: true where a token counts in the losses; what padding holds changes nothing else.
    num_sequences: the N tokens are so many rows of equal length, one after the other; only
        balance="sequence" and expert choice ask.
    axis_names: inside shard_map, the mesh axes that tokens are split over.
    """
    num_tokens = x_ND.shape[0]
    assert num_tokens % num_sequences == 0, (num_tokens, num_sequences)
    real_N = jnp.ones(num_tokens, jnp.float32) if mask_N is None else mask_N.astype(jnp.float32)
    keep_N = jnp.ones_like(real_N) if config.count_padding else real_N
    logits = router_logits(params, x_ND, config, rng)
    scores_NJ = scores(logits.noisy_NJ, config)
    token_N = shared_weight_N = None
    if config.selection == "expert_choice":
        token_N, chosen_N, weights_N = choose_tokens(scores_NJ, real_N, num_sequences, config)
        token_N, chosen_N = keep((token_N, chosen_N), ROUTING)
        chosen_NK = chosen_N[:, None]
        weights_NK = importance_NK = weights_N[:, None]
    else:
        chosen_NK = choose_experts(logits.noisy_NJ, scores_NJ, params.get("b_select"), config)
        chosen_NK = keep(chosen_NK, ROUTING)
        weights_NK, importance_NK, shared_weight_N = _weigh(
            logits.noisy_NJ, scores_NJ, chosen_NK, config
        )
    batch = Batch(keep_N, num_sequences, axis_names)
    chosen_NJ, importance_NJ = _by_expert(chosen_NK, importance_NK, token_N, num_tokens, config)
    return Routing(
        experts_NK=chosen_NK + config.num_shared,
        weights_NK=weights_NK * config.scale,
        token_N=token_N,
        shared_weight_N=shared_weight_N,
        scores_NK=weights_NK if token_N is not None else _pick(scores_NJ, chosen_NK),
        shared_weight=jnp.zeros(())
        if shared_weight_N is None
        else mean(shared_weight_N, real_N, axis_names),
        dropped=jnp.zeros(())
        if token_N is None
        else mean(1.0 - chosen_NJ.max(axis=1), real_N, axis_names),
        **_statistics(logits, scores_NJ, chosen_NJ, importance_NJ, batch, config),
    )


def _weigh(
    logits_NJ: jax.Array, scores_NJ: jax.Array, chosen_NK: jax.Array, config: MoEConfig
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Weights of the chosen, what each adds to its expert's importance, the shared weight."""
    if config.weighting == "selected":
        weights_NK = jax.nn.softmax(_pick(logits_NJ, chosen_NK), axis=1)
        return weights_NK, weights_NK, None
    scores_NK = _pick(scores_NJ, chosen_NK)
    if config.weighting == "scores":
        return scores_NK, scores_NK, None
    if config.weighting == "renormalized":
        # Sigmoids may all be 0; a softmax's largest K cannot.
        weights_NK = scores_NK / jnp.maximum(scores_NK.sum(axis=1, keepdims=True), 1e-20)
        return weights_NK, weights_NK, None
    largest_N = scores_NK[:, 0]  # the best comes first, and softmax keeps the order
    weights_NK = scores_NK
    if config.weighting == "normalized":
        weights_NK = largest_N[:, None] * jax.nn.softmax(scores_NK, axis=1)
    return weights_NK, scores_NK, 1.0 - largest_N


def _pick(values_NJ: jax.Array, chosen_NK: jax.Array) -> jax.Array:
    """values[n, chosen[n, k]]. No gather, whose gradient would be a scatter: this fuses."""
    at_NKJ = chosen_NK[:, :, None] == jnp.arange(values_NJ.shape[1])
    return jnp.sum(jnp.where(at_NKJ, values_NJ[:, None, :], 0.0), axis=2)


def _by_expert(chosen_NK, importance_NK, token_N, num_tokens, config) -> tuple:
    """Choices (1.0) and their importance as matrices [tokens, J]."""
    one_hot_NKJ = jax.nn.one_hot(chosen_NK, config.num_routed, dtype=jnp.float32)
    chosen_NJ = one_hot_NKJ.sum(axis=1)
    importance_NJ = jnp.sum(one_hot_NKJ * importance_NK[:, :, None], axis=1)
    if token_N is None:
        return chosen_NJ, importance_NJ
    both = (jax.ops.segment_sum(m, token_N, num_tokens) for m in (chosen_NJ, importance_NJ))
    return tuple(both)


def _statistics(
    logits: Logits,
    scores_NJ: jax.Array,
    chosen_NJ: jax.Array,
    importance_NJ: jax.Array,
    batch: Batch,
    config: MoEConfig,
) -> dict[str, jax.Array]:
    """The fields of `Routing` that say how evenly experts are used."""
    keep_N, names = batch.keep_N, batch.axis_names
    counts_J = load_J = masked_sum(chosen_NJ, keep_N)
    importance_J = masked_sum(importance_NJ, keep_N)
    chooses = config.balance == "cv_squared" and config.routed_per_token < config.num_routed
    if logits.std_NJ is not None and chooses:
        load_J = noisy_load(logits, keep_N, config)
    probs_NJ = probabilities(scores_NJ, config)
    balance = balance_loss(probs_NJ, chosen_NJ, importance_J, load_J, batch, config)
    z = z_loss(logits.clean_NJ, batch) if config.z_weight else jnp.zeros((), jnp.float32)
    counts_E = jnp.concatenate([jnp.full(config.num_shared, keep_N.sum()), counts_J])
    return {
        "importance_J": importance_J,
        "load_J": load_J,
        "counts_E": total(counts_E, names),
        "prob_sums_J": total(masked_sum(probs_NJ, keep_N), names),
        "balance_loss": config.balance_weight * balance,
        "z_loss": config.z_weight * z,
    }
