"""Batches that a policy makes itself: answers, rewards, advantages (for GRPO, `moejax.train.grpo`).

`OnPolicy` is what `moejax.train.loop.fit` asks for a batch, step by step. An iteration draws
answers to some prompts with the parameters as they are, has them rewarded, and is then read in
`epochs` passes of `minibatches` parts: so many updates. What it drew lies in the work directory
until the next one, so a run that was killed between two updates of an iteration goes on with it.

How answers are drawn and what earns a reward are functions given by the caller: nothing here knows
of engines, tasks or graders.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions
from moejax.train.grpo import GrpoConfig, answer_logp, group_advantages
from moejax.train.loss import DEFAULT_OPTIONS

# (params, prompts, seed) -> the ids of one answer per prompt, its end token included if it has one.
Rollout = Callable[[tree.Tree, Sequence[Sequence[int]], int], Sequence[Sequence[int]]]
# (number of the problem, ids of an answer) -> reward.  Called once per iteration, with all of them.
Reward = Callable[[Sequence[int], Sequence[Sequence[int]]], Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Judged:
    """How answers come to be and what they earn.

    Attributes:
      rollout, reward: see above.
      describe: (number of the problem, ids of an answer) -> what the samples' file says of it.
    """

    rollout: Rollout
    reward: Reward
    describe: Callable[[int, Sequence[int]], Mapping[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class RlConfig:
    """How much is drawn, and how often it is read.

    Attributes:
      prompts: problems per iteration. answers: to each of them (a group, at least 2).
      epochs: passes over an iteration's answers. minibatches: updates per pass; divides
        prompts * answers.
      max_answer: most tokens of an answer. seed: of the order of problems and of all draws.
    """

    prompts: int = 16
    answers: int = 8
    epochs: int = 1
    minibatches: int = 1
    max_answer: int = 128
    seed: int = 0

    def __post_init__(self):
        for name in ("prompts", "epochs", "minibatches", "max_answer"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.answers < 2:
            raise InputError(f"answers={self.answers}: a group needs at least 2 answers")
        if self.prompts * self.answers % self.minibatches:
            raise InputError(
                f"{self.prompts} prompts x {self.answers} answers do not divide into "
                f"minibatches={self.minibatches}: choose a divisor of {self.prompts * self.answers}"
            )

    @property
    def updates(self) -> int:
        """Updates per iteration."""
        return self.epochs * self.minibatches


class OnPolicy:
    """`batches(step, params)` for `fit`: draws when an iteration begins, then hands out its parts.

    Args:
      model: the policy's config.
      settings, grpo: how much is drawn; what its advantages are.
      prompts: token ids of every problem.
      judged: how answers are drawn and rewarded.
      folder: where iterations are kept.
      reference: parameters that the KL is measured from; None with a kl_weight of 0.
      options: how to compute.

    Errors: InputError where there are fewer problems than an iteration takes, or a prompt that
    leaves no room for an answer.
    """

    def __init__(
        self,
        model: ModelConfig,
        settings: RlConfig,
        grpo: GrpoConfig,
        prompts: Sequence[Sequence[int]],
        judged: Judged,
        folder: str | os.PathLike[str],
        *,
        reference: tree.Tree | None = None,
        options: ForwardOptions = DEFAULT_OPTIONS,
    ):
        if len(prompts) < settings.prompts:
            raise InputError(
                f"{len(prompts)} problems for {settings.prompts} per iteration: give more, or "
                "lower prompts"
            )
        longest = max(map(len, prompts))
        self._length = -(-(longest + settings.max_answer) // 32) * 32
        if longest + settings.max_answer > model.max_position:
            raise InputError(
                f"the longest prompt has {longest} tokens, which with max_answer="
                f"{settings.max_answer} is more than the model's {model.max_position}"
            )
        if grpo.kl_weight and reference is None:
            raise InputError(f"kl_weight={grpo.kl_weight} needs the reference's parameters")
        self._settings, self._grpo, self._prompts = settings, grpo, prompts
        self._judged, self._folder, self._reference = judged, Path(folder), reference
        self._drawn: tuple[int, dict[str, np.ndarray]] | None = None
        self._logp = jax.jit(lambda params, batch: answer_logp(params, model, batch, options)[0])

    def __call__(self, step: int, params: tree.Tree) -> dict[str, np.ndarray]:
        """The rows of one update [prompts * answers / minibatches, ...]."""
        iteration, update = divmod(step, self._settings.updates)
        if self._drawn is None or self._drawn[0] != iteration:
            fresh = update == 0
            rows = self._draw(iteration, params) if fresh else self._read(iteration)
            self._drawn = iteration, rows
        return self._part(self._drawn[1], iteration, update)

    def problems(self, iteration: int) -> list[int]:
        """The numbers of the problems of an iteration: all are seen before one is seen again."""
        size, total = self._settings.prompts, len(self._prompts)
        chosen = []
        for at in range(iteration * size, (iteration + 1) * size):
            epoch, place = divmod(at, total)
            chosen.append(int(_rng(self._settings.seed, 1, epoch).permutation(total)[place]))
        return chosen

    def _draw(self, iteration: int, params: tree.Tree) -> dict[str, np.ndarray]:
        settings = self._settings
        numbers = [n for n in self.problems(iteration) for _ in range(settings.answers)]
        seed = int(_rng(settings.seed, 2, iteration).integers(2**31 - 1))
        prompts = [self._prompts[n] for n in numbers]
        answers = self._judged.rollout(params, prompts, seed)
        answers = [list(answer)[: settings.max_answer] for answer in answers]
        rewards = np.asarray(self._judged.reward(numbers, answers), np.float32)
        groups = rewards.reshape(settings.prompts, settings.answers)
        rows = self._rows(prompts, answers)
        rows["advantages"] = group_advantages(groups, self._grpo.scale).reshape(-1)
        rows["reward"] = rewards
        rows["mixed"] = np.repeat(np.ptp(groups, axis=1) > 0, settings.answers).astype(np.float32)
        rows["old_logp"] = self._logps(params, rows)
        if self._grpo.kl_weight:
            rows["ref_logp"] = self._logps(self._reference, rows)
        self._write(iteration, rows, numbers, answers)
        return rows

    def _rows(self, prompts, answers) -> dict[str, np.ndarray]:
        shape = (len(prompts), self._length)
        rows = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids")}
        rows["loss_mask"] = np.zeros(shape, bool)
        rows["positions"] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            rows["tokens"][row, :end] = [*prompt, *answer]
            rows["segment_ids"][row, :end] = 1
            rows["loss_mask"][row, len(prompt) : end] = True
        return rows

    def _logps(self, params, rows) -> np.ndarray:
        """log pi of all rows, a minibatch at a time."""
        size = len(rows["tokens"]) // self._settings.minibatches
        names = ("tokens", "segment_ids", "positions", "loss_mask")
        parts = [
            np.asarray(self._logp(params, {n: rows[n][at : at + size] for n in names}))
            for at in range(0, len(rows["tokens"]), size)
        ]
        return np.concatenate(parts)

    def _part(self, rows, iteration: int, update: int) -> dict[str, np.ndarray]:
        epoch, part = divmod(update, self._settings.minibatches)
        total = len(rows["tokens"])
        order = _rng(self._settings.seed, 3, iteration, epoch).permutation(total)
        size = total // self._settings.minibatches
        return {name: value[order[part * size :][:size]] for name, value in rows.items()}

    def _write(self, iteration: int, rows, numbers, answers) -> None:
        """Keeps the iteration for a resumed run, and its answers for people."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, answer, reward in zip(numbers, answers, rows["reward"], strict=True):
            said = {"iteration": iteration, "problem": number, "reward": float(reward)}
            said["ids"] = [int(i) for i in answer]
            if self._judged.describe is not None:
                said |= self._judged.describe(number, answer)
            lines.append(json.dumps(said) + "\n")
        atomic.write_text(self._folder / f"samples_{iteration:06d}.jsonl", "".join(lines))
        atomic.write_npz(self._folder / "drawn.npz", rows | {"iteration": iteration})

    def _read(self, iteration: int) -> dict[str, np.ndarray]:
        path = self._folder / "drawn.npz"
        if path.is_file():
            rows = atomic.read_npz(path)
            if int(rows.pop("iteration")) == iteration:
                return rows
        raise InputError(
            f"{path} does not hold iteration {iteration}, in the middle of which this run was "
            "saved: resume from a checkpoint at the end of an iteration, or start afresh"
        )


def _rng(*numbers: int) -> np.random.Generator:
    return np.random.default_rng(list(numbers))
