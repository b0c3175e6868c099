"""From a token to its scores: the gate, its perturbations in training, softmax or sigmoid.

Everything here is float32 whatever the model computes in: a rounded logit changes which experts
are chosen, and that is not an error that averages out.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.moe.config import MoEConfig

NOISE_FLOOR = 0.01


@dataclasses.dataclass(frozen=True)
class PartKey:
    """A key for all tokens, for a device that has the part `index` of equal ones."""

    key: jax.Array
    index: jax.Array


@dataclasses.dataclass(frozen=True)
class Logits:
    """clean_NJ before learned noise, noisy_NJ after it (the same array without), std_NJ of it."""

    clean_NJ: jax.Array
    noisy_NJ: jax.Array
    std_NJ: jax.Array | None


def router_logits(
    params: dict[str, jax.Array],
    x_ND: jax.Array,
    config: MoEConfig,
    rng: jax.Array | PartKey | None,
) -> Logits:
    """Logits of N tokens; a key turns on what perturbs them.

    jitter: z = gate(x * u), u ~ U(1 - jitter, 1 + jitter) for each number of x (Switch, arXiv
        2101.03961, section 2.2). For what the experts see, `expert_inputs`.
    noise: z = gate(x) + n * (softplus(x w_noise) + 0.01), n ~ N(0, 1) (Shazeer et al. 2017, eq. 4).
    """
    x_ND = _jittered(x_ND, config, rng)
    clean_NJ = gate_logits(params, x_ND, config)
    if rng is None or not config.noise:
        return Logits(clean_NJ, clean_NJ, None)
    std_NJ = jax.nn.softplus(_matmul(x_ND, params["w_noise"])) + NOISE_FLOOR
    noise_NJ = _drawn(rng, clean_NJ.shape, jax.random.normal)
    return Logits(clean_NJ, clean_NJ + noise_NJ * std_NJ, std_NJ)


def expert_inputs(x_ND: jax.Array, config: MoEConfig, rng: jax.Array | PartKey | None) -> jax.Array:
    """What the experts see: x, or with `jitter_experts` the x * u that the router saw."""
    if not config.jitter_experts:
        return x_ND
    return _jittered(x_ND, config, rng).astype(x_ND.dtype)


def _jittered(x_ND: jax.Array, config: MoEConfig, rng: jax.Array | PartKey | None) -> jax.Array:
    if rng is None or not config.jitter:
        return x_ND
    low, high = 1 - config.jitter, 1 + config.jitter

    def draw(key, shape, dtype):  # the key itself draws the learned noise
        return jax.random.uniform(jax.random.fold_in(key, 1), shape, dtype, low, high)

    return x_ND * _drawn(rng, x_ND.shape, draw)


def _drawn(rng: jax.Array | PartKey, shape: tuple[int, ...], draw: Callable) -> jax.Array:
    """float32 draws [N, ...] of this device's tokens.

    Each token has a key of its own, its place among all, so that what it draws depends on no mesh
    and a device draws for its own alone: a slice of one draw for all would be cut after a TPU made
    the whole.
    """
    key, index = (rng.key, rng.index) if isinstance(rng, PartKey) else (rng, 0)
    place_N = index * shape[0] + jnp.arange(shape[0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, place_N)
    return jax.vmap(lambda one: draw(one, shape[1:], jnp.float32))(keys)


def gate_logits(params: dict[str, jax.Array], x_ND: jax.Array, config: MoEConfig) -> jax.Array:
    """Router logits [N, J] before noise: x w_out, or tanh(x w_hidden) w_out for the "mlp" gate.

    With a soft cap c they become c tanh(z / c) (Gemma 2, arXiv 2408.00118, section 2).
    """
    hidden = x_ND
    if config.gate == "mlp":
        hidden = jnp.tanh(_matmul(x_ND, params["w_hidden"]))
    logits_NJ = _matmul(hidden, params["w_out"])
    if config.soft_cap is not None:
        logits_NJ = config.soft_cap * jnp.tanh(logits_NJ / config.soft_cap)
    return logits_NJ


def scores(logits_NJ: jax.Array, config: MoEConfig) -> jax.Array:
    """softmax(z) over the routed experts, or sigmoid(z) of each (DeepSeek-V3, eq. 15)."""
    if config.score == "sigmoid":
        return jax.nn.sigmoid(logits_NJ)
    return jax.nn.softmax(logits_NJ, axis=1)


def probabilities(scores_NJ: jax.Array, config: MoEConfig) -> jax.Array:
    """Scores as a distribution over experts; sigmoids are divided by their sum (V3, eq. 19)."""
    if config.score == "sigmoid":
        return scores_NJ / jnp.maximum(scores_NJ.sum(axis=1, keepdims=True), 1e-20)
    return scores_NJ


def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    # HIGHEST: a TPU would otherwise round float32 operands to bfloat16.
    return jnp.matmul(
        x.astype(jnp.float32), w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
