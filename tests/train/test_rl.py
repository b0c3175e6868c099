"""On-policy batches: deterministic, resumable in the middle of an iteration, and they do teach."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.serve.generate import GenerateConfig, generate
from moejax.serve.sampling import SamplingConfig
from moejax.train.grpo import GrpoConfig, make_grpo_loss
from moejax.train.loop import RunInfo, TrainConfig, fit
from moejax.train.optim import OptimConfig
from moejax.train.rl import Judged, OnPolicy, RlConfig

MODEL = ModelConfig("llama", 12, 1, 16, 24, 2, 1, 8, max_position=64)
PROMPTS = [[2, 3], [4, 3, 2], [5, 2], [6, 3]]
GRPO = GrpoConfig(kl_weight=0.01)


def rollout(params, prompts, seed):
    settings = GenerateConfig(4, SamplingConfig(1.0), seed=seed)
    return [c.ids for c in generate(params, MODEL, prompts, settings)]


def likes_sevens(numbers, answers):
    return [sum(token == 7 for token in answer) / 4 for answer in answers]


@pytest.fixture(scope="module")
def start():
    return jax.tree.map(np.asarray, transformer.init_params(MODEL, jax.random.key(0)))


def train(start, folder, steps, reward=likes_sevens):
    settings = RlConfig(2, 8, 1, 2, max_answer=4)
    batches = OnPolicy(
        MODEL, settings, GRPO, PROMPTS, Judged(rollout, reward), folder / "rl", reference=start
    )
    config = TrainConfig(steps, OptimConfig("adamw", 0.02, "constant"))
    loss, info = make_grpo_loss(MODEL, GRPO), RunInfo(quiet=True, on_policy=True)
    return fit(config, loss, start, {}, batches, folder, info=info)


def test_what_is_rewarded_is_done_more_often(start, tmp_path):
    result = train(start, tmp_path, 24)
    rewards = [r["reward"] for r in result.records]
    assert np.mean(rewards[:4]) < 0.2 and np.mean(rewards[-4:]) > 0.6
    lines = (tmp_path / "rl" / "samples_000003.jsonl").read_text().splitlines()
    assert len(lines) == 16 and set(json.loads(lines[0])) >= {"problem", "reward", "ids"}


def test_killed_between_two_updates_of_an_iteration(start, tmp_path):
    whole = train(start, tmp_path / "whole", 6)
    calls = []

    def dies(numbers, answers):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return likes_sevens(numbers, answers)

    with pytest.raises(KeyboardInterrupt):  # in iteration 2; nothing was saved yet
        train(start, tmp_path / "cut", 6, dies)
    cut = train(start, tmp_path / "cut", 6)
    assert [r["loss"] for r in cut.records] == [r["loss"] for r in whole.records]
    batches = OnPolicy(
        MODEL,
        RlConfig(2, 8, 1, 2, max_answer=4),
        GRPO,
        PROMPTS,
        Judged(rollout, likes_sevens),
        tmp_path / "whole" / "rl",
        reference=start,
    )
    part = batches(5, None)  # the second update of the last iteration: read, not drawn
    assert part["tokens"].shape == (8, 32)
    with pytest.raises(InputError, match="iteration 1, in the middle"):
        batches(3, None)


def test_every_problem_is_seen_before_one_is_seen_again(tmp_path):
    functions, settings = Judged(rollout, likes_sevens), RlConfig(3, 2, max_answer=4)
    batches = OnPolicy(MODEL, settings, GrpoConfig(kl_weight=0), PROMPTS, functions, tmp_path)
    seen = [n for i in range(4) for n in batches.problems(i)]
    assert all(sorted(seen[at : at + 4]) == [0, 1, 2, 3] for at in (0, 4, 8))


def test_what_cannot_work_is_refused(tmp_path):
    functions = Judged(rollout, likes_sevens)
    with pytest.raises(InputError, match="4 problems for 9"):
        OnPolicy(MODEL, RlConfig(9, max_answer=4), GRPO, PROMPTS, functions, tmp_path, reference={})
    with pytest.raises(InputError, match="more than the model's 64"):
        OnPolicy(MODEL, RlConfig(2), GRPO, PROMPTS, functions, tmp_path, reference={})
    with pytest.raises(InputError, match="reference"):
        OnPolicy(MODEL, RlConfig(2, max_answer=8), GRPO, PROMPTS, functions, tmp_path)
    with pytest.raises(InputError, match="at least 2"):
        RlConfig(answers=1)
    with pytest.raises(InputError, match="divisor of 128"):
        RlConfig(minibatches=3)
