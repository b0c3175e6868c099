"""Two problems small enough to be exact, on which tuning loses diversity (`launch.collapse`).

No flags here, so that a test can use it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moejax.evals.at_k import pass_at_k_bound

KS = (1, 2, 4, 16)


@dataclasses.dataclass(frozen=True)
class Bandit:
    """start: probabilities of the arms [A]; rewards: [A], 0 or 1."""

    start: np.ndarray
    rewards: np.ndarray

    @property
    def good(self) -> np.ndarray:
        """The numbers of the arms that earn."""
        return np.flatnonzero(self.rewards > 0)


def make_bandit(num_arms: int = 12, num_good: int = 4, seed: int = 0) -> Bandit:
    """An uneven start over arms, the first `num_good` of which earn 1."""
    logits = np.random.default_rng(seed).normal(0, 0.6, num_arms)
    return Bandit(_softmax(logits), (np.arange(num_arms) < num_good).astype(float))


def exact_gradient(bandit: Bandit, steps: int, lr: float = 0.5, beta: float = 0.0) -> np.ndarray:
    """Policies [steps + 1, A] of gradient ascent on E[r] - beta KL(policy || start)."""
    logits, policies = np.log(bandit.start), []
    for _ in range(steps + 1):
        policy = _softmax(logits)
        policies.append(policy)
        gain = bandit.rewards - beta * (np.log(policy) - np.log(bandit.start))
        logits = logits + lr * policy * (gain - policy @ gain)
    return np.stack(policies)


def sampled_gradient(bandit: Bandit, steps: int, lr: float = 0.2, seed: int = 0) -> np.ndarray:
    """REINFORCE: policies [steps + 1, A] of logits += lr * r * grad log policy(arm), arm drawn."""
    rng, logits, policies = np.random.default_rng(seed), np.log(bandit.start), []
    for _ in range(steps + 1):
        policy = _softmax(logits)
        policies.append(policy)
        arm = rng.choice(len(policy), p=policy)
        score = -policy
        score[arm] += 1
        logits = logits + lr * bandit.rewards[arm] * score
    return np.stack(policies)


def closed_form(bandit: Bandit, beta: float) -> np.ndarray:
    """argmax of E[r] - beta KL(policy || start): start * exp(r / beta), normalised."""
    return _softmax(np.log(bandit.start) + bandit.rewards / beta)


def spread_of_good(bandit: Bandit, policies: np.ndarray) -> np.ndarray:
    """exp(entropy) of the policy within the good arms: how many of them are really used."""
    within = policies[:, bandit.good]
    within = within / within.sum(1, keepdims=True)
    return np.exp(-(within * np.log(np.maximum(within, 1e-300))).sum(1))


def tune(steps: int, seed: int = 0, lr: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logistic regression on separable examples: steps [S] and test chances p [S, problems].

    60 examples of 40 features, labels by a true direction; descent on the mean cross-entropy. The
    500 test problems follow the same law: p is the chance of the right label.
    """
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=40)
    train, test = rng.normal(size=(60, 40)), rng.normal(size=(500, 40))
    signed, signed_test = (x * np.sign(x @ truth)[:, None] for x in (train, test))
    kept = np.unique(np.round(np.geomspace(1, steps + 1, 60)).astype(int)) - 1
    weights, chances = np.zeros(40), []
    for step in range(steps + 1):
        if step in kept:
            chances.append(_sigmoid(signed_test @ weights))
        weights = weights + lr * signed.T @ _sigmoid(-(signed @ weights)) / len(signed)
    return kept, np.stack(chances)


def tuning_table(kept: np.ndarray, chances: np.ndarray) -> list[dict[str, float]]:
    """Per kept step: E[p], Var(p), Pass@k and its bound, exactly for this population."""
    rows = []
    for step, p in zip(kept, chances, strict=True):
        row = {"step": float(step), "mean": p.mean(), "variance": p.var()}
        for k in KS:
            row[f"pass@{k}"] = float((1 - (1 - p) ** k).mean())
            if k >= 2:
                row[f"bound@{k}"] = pass_at_k_bound(1 - p.mean(), p.var(), k)
        rows.append({name: float(value) for name, value in row.items()})
    return rows


def bandit_summary(bandit: Bandit, runs: dict[str, np.ndarray], beta: float) -> dict[str, Any]:
    """Per run, at its end: probabilities, the good arms' share and how many of them are used."""
    ends = {"start": bandit.start} | {name: run[-1] for name, run in runs.items()}
    ends["closed form"] = closed_form(bandit, beta)
    return {
        name: {
            "policy": policy.tolist(),
            "good": float(policy[bandit.good].sum()),
            "used": float(spread_of_good(bandit, policy[None])[0]),
        }
        for name, policy in ends.items()
    }


def draw(bandit: Bandit, runs: dict[str, np.ndarray], table: list[dict[str, float]]):
    """Both problems: what is earned and what is left of the choice, over steps."""
    from matplotlib.figure import Figure  # a dry run should not wait for it

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    (earned, used), (passes, spread) = figure.subplots(2, 2)
    for name, run in runs.items():
        earned.plot(run[:, bandit.good].sum(1), label=name)
        used.plot(spread_of_good(bandit, run), label=name)
    earned.set_title("bandit: share of the arms that earn")
    used.set_title(f"bandit: how many of the {len(bandit.good)} are used")
    used.set_ylim(0.9, len(bandit.good) + 0.1)
    for axes in (earned, used):
        axes.set_xlabel("step")
        axes.legend(frameon=False)
    steps = [row["step"] + 1 for row in table]
    for i, k in enumerate(KS):
        passes.plot(steps, [row[f"pass@{k}"] for row in table], color=f"C{i}", label=f"Pass@{k}")
        if k > 2:
            bound = [row[f"bound@{k}"] for row in table]
            passes.plot(steps, bound, color=f"C{i}", linestyle=":", label=f"bound at {k}")
    passes.set_title("tuning: Pass@k over test problems")
    spread.plot(steps, [row["mean"] for row in table], label="E[p]")
    spread.plot(steps, [row["variance"] for row in table], label="Var(p)")
    spread.set_title("tuning: mean and variance of Pass@1")
    for axes in (passes, spread):
        axes.set_xscale("log")
        axes.set_xlabel("step + 1")
        axes.legend(frameon=False, fontsize=8)
    for axes in (earned, used, passes, spread):
        axes.grid(alpha=0.3)
    return figure


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))
