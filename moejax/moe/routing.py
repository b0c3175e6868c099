"""The router: which experts a token gets, with what weights, and how evenly they are used.

Everything here is float32 whatever the model computes in: a rounded logit changes which experts
are chosen, and that is not an error that averages out.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.moe.config import MoEConfig

NOISE_FLOOR = 0.01
ROUTER_STDDEV = 0.02


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The router's decision for N tokens; J is the number of routed experts, K those per token.

    experts_NK: int32 ids in the layer's numbering, where a shared expert is 0.
    weights_NK: float32 weights of those.
    shared_weight_N: float32 weight of the shared expert; None when there is none.
    counts_E: float32, tokens per expert (the shared one gets them all), of the tokens that count.
    importance_J, load_J: the two quantities whose evenness is asked for.
    balance_loss: balance_weight * (CV^2(importance) + CV^2(load)).
    """

    experts_NK: jax.Array
    weights_NK: jax.Array
    shared_weight_N: jax.Array | None
    counts_E: jax.Array
    importance_J: jax.Array
    load_J: jax.Array
    balance_loss: jax.Array


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
    return shapes


def init_router(
    key: jax.Array, d_model: int, config: MoEConfig, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, jax.Array]:
    """A fresh router: N(0, 0.02) for the gate, zeros for the noise matrix.

    With zeros the noise starts at softplus(0) + 0.01 = 0.70, far above the first logits, so early
    routing is nearly uniform; that is what lets equal experts drift apart.
    """
    shapes = abstract_router(d_model, config)
    keys = jax.random.split(key, len(shapes))
    return {
        name: jnp.zeros(shape, dtype)
        if name == "w_noise"
        else (ROUTER_STDDEV * jax.random.normal(k, shape, jnp.float32)).astype(dtype)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def route(
    params: dict[str, jax.Array],
    x_ND: jax.Array,
    config: MoEConfig,
    *,
    mask_N: jax.Array | None = None,
    rng: jax.Array | None = None,
) -> Routing:
    """Chooses `routed_per_token` experts for each token and weighs them.

    z = gate(x) (+ noise * (softplus(x w_noise) + 0.01) in training, that is when rng is given)
    s = softmax(z) over the routed experts;  T = the largest of z;  s_max = max s
      normalized    g_i = s_max softmax_T(s)_i (a second softmax, of probabilities), g_0 = 1 - s_max
      unnormalized  g_i = s_i,                                                       g_0 = 1 - s_max
      selected      g_i = softmax_T(z)_i, no shared expert (plain sparse upcycling)
    (XFT's code, and issue 4 there for 1 - s_max.)  mask_N: true where a token counts in the losses.
    """
    clean_NJ = gate_logits(params, x_ND, config)
    std_NJ = None
    logits_NJ = clean_NJ
    if rng is not None and config.noise:
        std_NJ = jax.nn.softplus(_matmul(x_ND, params["w_noise"])) + NOISE_FLOOR
        logits_NJ = clean_NJ + jax.random.normal(rng, clean_NJ.shape, jnp.float32) * std_NJ

    k = config.routed_per_token
    top_logits, chosen_NK = jax.lax.top_k(logits_NJ, min(k + 1, config.num_routed))
    chosen_NK = chosen_NK[:, :k]
    weights_NK, importance_NK, shared_weight_N = _weigh(logits_NJ, chosen_NK, config)

    keep_N = jnp.ones(x_ND.shape[0], jnp.float32)
    if mask_N is not None and not config.count_padding:
        keep_N = mask_N.astype(jnp.float32)
    chosen_NKJ = jax.nn.one_hot(chosen_NK, config.num_routed, dtype=jnp.float32)
    counts_J = jnp.einsum("nkj,n->j", chosen_NKJ, keep_N)
    importance_J = jnp.einsum("nkj,nk,n->j", chosen_NKJ, importance_NK, keep_N)
    load_J = counts_J
    if std_NJ is not None and k < config.num_routed:
        prob_NJ = _stay_probability(clean_NJ, logits_NJ, std_NJ, top_logits, config)
        load_J = jnp.einsum("nj,n->j", prob_NJ, keep_N)
    counts_shared = jnp.full(config.num_shared, keep_N.sum())
    return Routing(
        experts_NK=chosen_NK.astype(jnp.int32) + config.num_shared,
        weights_NK=weights_NK,
        shared_weight_N=shared_weight_N,
        counts_E=jnp.concatenate([counts_shared, counts_J]),
        importance_J=importance_J,
        load_J=load_J,
        balance_loss=config.balance_weight * (cv_squared(importance_J) + cv_squared(load_J)),
    )


def gate_logits(params: dict[str, jax.Array], x_ND: jax.Array, config: MoEConfig) -> jax.Array:
    """Router logits [N, J] before noise: x w_out, or tanh(x w_hidden) w_out for the "mlp" gate."""
    hidden = x_ND
    if config.gate == "mlp":
        hidden = jnp.tanh(_matmul(x_ND, params["w_hidden"]))
    return _matmul(hidden, params["w_out"])


def cv_squared(values: jax.Array) -> jax.Array:
    """Squared coefficient of variation, var(v) / (mean(v)^2 + 1e-10) with the unbiased variance.

    Zero for a single value, where there is nothing to balance.
    """
    if values.shape[0] == 1:
        return jnp.zeros((), jnp.float32)
    values = values.astype(jnp.float32)
    return jnp.var(values, ddof=1) / (jnp.mean(values) ** 2 + 1e-10)


def _weigh(
    logits_NJ: jax.Array, chosen_NK: jax.Array, config: MoEConfig
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Weights of the chosen, what each adds to its expert's importance, the shared weight."""
    if config.weighting == "selected":
        weights_NK = jax.nn.softmax(jnp.take_along_axis(logits_NJ, chosen_NK, axis=1), axis=1)
        return weights_NK, weights_NK, None
    probs_NK = jnp.take_along_axis(jax.nn.softmax(logits_NJ, axis=1), chosen_NK, axis=1)
    largest_N = probs_NK[:, 0]  # top_k sorts, and softmax keeps the order
    weights_NK = probs_NK
    if config.weighting == "normalized":
        weights_NK = largest_N[:, None] * jax.nn.softmax(probs_NK, axis=1)
    return weights_NK, probs_NK, 1.0 - largest_N


def _stay_probability(
    clean_NJ: jax.Array,
    logits_NJ: jax.Array,
    std_NJ: jax.Array,
    top_logits: jax.Array,
    config: MoEConfig,
) -> jax.Array:
    """P(expert among the chosen if its own noise were drawn again), Shazeer et al. 2017 eq. 9.

    The threshold to beat is the k-th largest of the other experts' noisy logits: the (k+1)-th of
    all for a chosen expert, the k-th for the rest.
    """
    k = config.routed_per_token
    to_stay_N1, to_enter_N1 = top_logits[:, k, None], top_logits[:, k - 1, None]
    compared = logits_NJ if config.load_estimator == "noisy_logits" else logits_NJ - clean_NJ
    threshold_NJ = jnp.where(compared > to_stay_N1, to_stay_N1, to_enter_N1)
    return jax.scipy.stats.norm.cdf((clean_NJ - threshold_NJ) / std_NJ)


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    # HIGHEST: a TPU would otherwise round float32 operands to bfloat16.
    return jnp.matmul(
        x.astype(jnp.float32), w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
