"""GRPO: a policy gradient whose baseline is the mean reward of a group (arXiv 2402.03300, eq. 3).

    A_i = (r_i - mean r) / std r                              over the G answers to one prompt
    J = mean_i 1/|o_i| sum_t min(rho A_i, clip(rho, 1 - low, 1 + high) A_i) - beta KL_t
    rho = pi(o_t) / pi_old(o_t),  KL_t = q - log q - 1,  q = pi_ref(o_t) / pi(o_t)

The mean over answers of the mean over tokens is the paper's; "token" weighs all tokens of a batch
alike (DAPO, arXiv 2503.14476). Dividing by std r favours prompts that are nearly always or never
solved; `scale=False` leaves it out (arXiv 2503.20783).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions, forward
from moejax.train.loss import DEFAULT_OPTIONS, Batch, targets, token_nll
from moejax.train.step import LossFn, Metrics

MEANS = ("answer", "token")


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """The objective.

    Attributes:
      clip_low, clip_high: how far the ratio may fall and rise before its gradient stops.
      kl_weight: beta, of the distance from the reference; 0 has no reference.
      scale: divide a group's advantages by their standard deviation.
      mean: "answer" (each answer counts alike) or "token".
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.04
    scale: bool = True
    mean: str = "answer"

    def __post_init__(self):
        if not (0 < self.clip_low < 1 and self.clip_high > 0 and math.isfinite(self.clip_high)):
            raise InputError(
                f"clip_low={self.clip_low} must lie in (0, 1), clip_high={self.clip_high} above 0"
            )
        if not (self.kl_weight >= 0 and math.isfinite(self.kl_weight)):
            raise InputError(f"kl_weight={self.kl_weight} must be 0 or more")
        if self.mean not in MEANS:
            raise InputError(f"mean={self.mean!r} is unknown: use {' or '.join(MEANS)}")


def group_advantages(rewards_PG: np.ndarray, scale: bool = True) -> np.ndarray:
    """(r - mean r) / std r within each row, float32 [P, G]; 0 where all rewards of a row are equal.

    ValueError for groups of fewer than two answers or a reward that is not finite.
    """
    rewards = np.asarray(rewards_PG, np.float64)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards [prompts, answers >= 2] are needed, got {rewards.shape}")
    if not np.isfinite(rewards).all():
        raise ValueError("a reward is not finite")
    centred = rewards - rewards.mean(1, keepdims=True)
    if not scale:
        return centred.astype(np.float32)
    std = rewards.std(1, keepdims=True)
    return np.divide(centred, std, out=np.zeros_like(centred), where=std > 1e-12).astype(np.float32)


def answer_logp(
    params: tree.Tree,
    config: ModelConfig,
    batch: Batch,
    options: ForwardOptions = DEFAULT_OPTIONS,
) -> tuple[jax.Array, jax.Array]:
    """log pi of every answer token, float32 [B, T], and which those are, 0 or 1.

    Position t holds the token t + 1 (`moejax.train.loss.targets`).
    """
    output = forward(
        params,
        config,
        jnp.asarray(batch["tokens"]),
        positions_BT=jnp.asarray(batch["positions"]),
        segment_ids_BT=jnp.asarray(batch["segment_ids"]),
        options=options,
    )
    target_BT, weight_BT = targets(batch)
    return -token_nll(params, config, output.hidden_BTD, target_BT) * weight_BT, weight_BT


def make_grpo_loss(
    config: ModelConfig,
    settings: GrpoConfig,
    options: ForwardOptions = DEFAULT_OPTIONS,
    logp: Callable[..., tuple[jax.Array, jax.Array]] = answer_logp,
) -> LossFn:
    """-J as a `LossFn` for `moejax.train.step.make_train_step`; what is frozen is joined in.

    A batch has what `moejax.train.loss` needs, one answer a row, and `advantages` [B], `old_logp`
    [B, T] and, with a kl_weight, `ref_logp` [B, T], all float32. Metrics: objective terms `policy`
    and `kl`, `clipped` (share of tokens whose gradient the clip stopped), `entropy` (mean of -log
    pi over the batch's own tokens: an estimate, of the policy that drew them while it is the same);
    with `reward` and `mixed` [B] in the batch also their means, and the answers' mean `length`.
    """

    def loss_fn(trainable, frozen, batch, rng) -> tuple[jax.Array, Metrics]:
        del rng
        params = tree.join(trainable, frozen) if frozen else trainable
        logp_BT, weight_BT = logp(params, config, batch, options)
        advantage_B1 = jnp.asarray(batch["advantages"], jnp.float32)[:, None]
        ratio_BT = jnp.exp(logp_BT - batch["old_logp"])
        clipped_BT = jnp.clip(ratio_BT, 1 - settings.clip_low, 1 + settings.clip_high)
        gain_BT = jnp.minimum(ratio_BT * advantage_B1, clipped_BT * advantage_B1)
        mean, count = _mean(weight_BT, settings.mean)
        policy = mean(gain_BT)
        metrics = {
            "policy": policy,
            "clipped": mean(gain_BT < ratio_BT * advantage_B1),
            "entropy": mean(-logp_BT),
            "target_count": count,
            "token_count": jnp.sum(jnp.asarray(batch["segment_ids"]) > 0),
        }
        if "reward" in batch:
            metrics["reward"] = jnp.mean(batch["reward"])
            metrics["mixed_groups"] = jnp.mean(batch["mixed"])
            metrics["length"] = jnp.mean(jnp.sum(weight_BT, axis=1))
        loss = -policy
        if settings.kl_weight:
            gap_BT = batch["ref_logp"] - logp_BT
            metrics["kl"] = mean(jnp.exp(gap_BT) - gap_BT - 1)
            loss += settings.kl_weight * metrics["kl"]
        return loss, metrics

    return loss_fn


def _mean(weight_BT: jax.Array, kind: str):
    """How values [B, T] of answer tokens become one number, and over how many things that is."""
    length_B = jnp.sum(weight_BT, axis=1)
    count = jnp.sum(weight_BT) if kind == "token" else jnp.sum(length_B > 0).astype(jnp.float32)

    def mean(values_BT):
        values_BT = values_BT * weight_BT
        if kind == "token":
            return jnp.sum(values_BT) / jnp.maximum(count, 1)
        per_answer_B = jnp.sum(values_BT, axis=1) / jnp.maximum(length_B, 1)
        return jnp.sum(per_answer_B) / jnp.maximum(count, 1)

    return mean, count
