"""GRPO: the objective against plain numpy, its gradient against the policy gradient, its limits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.train.grpo import GrpoConfig, answer_logp, group_advantages, make_grpo_loss

CONFIG = ModelConfig("llama", 11, 1, 8, 12, 2, 1, 4, max_position=16)


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(CONFIG, jax.random.key(0))


def made(seed: int = 0, num_rows: int = 4, length: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    segments = np.ones((num_rows, length), np.int32)
    segments[0, -2:] = 0
    mask = np.zeros((num_rows, length), bool)
    mask[:, 3:] = True
    return {
        "tokens": rng.integers(1, 11, (num_rows, length)).astype(np.int32),
        "segment_ids": segments,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), segments.shape),
        "loss_mask": mask,
        "advantages": rng.normal(size=num_rows).astype(np.float32),
        "old_logp": rng.normal(-2.4, 0.3, (num_rows, length)).astype(np.float32),
        "ref_logp": rng.normal(-2.4, 0.3, (num_rows, length)).astype(np.float32),
    }


@pytest.mark.parametrize("mean", ["answer", "token"])
def test_the_objective_is_the_papers(params, mean):
    settings, batch = GrpoConfig(0.1, 0.3, 0.5, mean=mean), made()
    loss, metrics = make_grpo_loss(CONFIG, settings)(params, {}, batch, None)
    logits = np.asarray(transformer.logits(params, CONFIG, jnp.asarray(batch["tokens"])))
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    per_answer, all_tokens = [], []
    for row in range(4):
        terms = []
        for t in range(2, 6):  # predicts token t + 1, of the answer
            if batch["segment_ids"][row, t + 1] == 0:
                continue
            logp = logits[row, t, batch["tokens"][row, t + 1]]
            rho, a = np.exp(logp - batch["old_logp"][row, t]), batch["advantages"][row]
            q = np.exp(batch["ref_logp"][row, t] - logp)
            gain = min(rho * a, np.clip(rho, 0.9, 1.3) * a)
            terms.append(gain - 0.5 * (q - np.log(q) - 1))
        per_answer.append(np.mean(terms))
        all_tokens += terms
    wanted = np.mean(per_answer) if mean == "answer" else np.mean(all_tokens)
    assert float(loss) == pytest.approx(-wanted, rel=2e-5)
    assert 0 < float(metrics["clipped"]) < 1
    assert float(metrics["target_count"]) == (4 if mean == "answer" else len(all_tokens))


def test_on_policy_the_gradient_is_reinforce(params):
    batch = made()
    old, weight = answer_logp(params, CONFIG, batch)
    batch |= {"old_logp": old, "ref_logp": old}
    settings = GrpoConfig(kl_weight=0.3)
    grads = jax.grad(lambda p: make_grpo_loss(CONFIG, settings)(p, {}, batch, None)[0])(params)

    def reinforce(p):
        logp, _ = answer_logp(p, CONFIG, batch)
        per_answer = (logp * batch["advantages"][:, None]).sum(1) / weight.sum(1)
        return -per_answer.mean()  # at the reference the KL is at its minimum: no gradient

    for got, wanted in zip(
        jax.tree.leaves(grads), jax.tree.leaves(jax.grad(reinforce)(params)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-7)


def test_beyond_the_clip_only_what_makes_it_worse_has_a_gradient(params):
    batch = made() | {"advantages": np.ones(4, np.float32)}
    now, _ = answer_logp(params, CONFIG, batch)
    loss = make_grpo_loss(CONFIG, GrpoConfig(kl_weight=0))

    def norm(old, sign):
        rows = batch | {"old_logp": old, "advantages": sign * batch["advantages"]}
        grads = jax.grad(lambda p: loss(p, {}, rows, None)[0])(params)
        return max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))

    assert norm(now - 1, 1) == 0 and norm(now - 1, -1) > 0  # already far likelier than before
    assert norm(now + 1, -1) == 0 and norm(now + 1, 1) > 0  # already far less likely


def test_advantages():
    found = group_advantages(np.array([[1, 0, 0, 1], [1, 1, 1, 1]]))
    np.testing.assert_allclose(found, [[1, -1, -1, 1], [0, 0, 0, 0]])
    plain = group_advantages(np.array([[1, 0, 0, 1]]), scale=False)
    np.testing.assert_allclose(plain, [[0.5, -0.5, -0.5, 0.5]])
    with pytest.raises(ValueError, match="answers >= 2"):
        group_advantages(np.ones((3, 1)))
    with pytest.raises(ValueError, match="finite"):
        group_advantages(np.array([[1, np.nan]]))


def test_settings_that_cannot_work_are_refused():
    for wrong in ({"clip_low": 1.5}, {"clip_high": 0}, {"kl_weight": -1}, {"mean": "row"}):
        with pytest.raises(InputError):
            GrpoConfig(**wrong)
