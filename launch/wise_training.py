"""The models of the WiSE-FT study: a tokenizer of characters, pre-training, tuning, GRPO."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.data import countdown
from moejax.data.countdown import Countdown
from moejax.data.examples import Example
from moejax.data.packing import pack
from moejax.evals.sweep import Answer, Problem
from moejax.io import atomic
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.serve.generate import GenerateConfig, generate, prepare
from moejax.serve.sampling import SamplingConfig
from moejax.train.grpo import GrpoConfig, make_grpo_loss
from moejax.train.loop import RunInfo, TrainConfig, fit
from moejax.train.loss import lm_loss
from moejax.train.optim import OptimConfig
from moejax.train.rl import Judged, OnPolicy, RlConfig

CHARACTERS = "\0\n 0123456789=+-*:"  # 0 pads, 1 ends an answer
EOS = 1
LONGEST = 64  # tokens of a problem and its derivation
ROW = 256  # tokens of a training row: some six of them


def encode(text: str) -> list[int]:
    """Ids of a text, one per character."""
    return [CHARACTERS.index(c) for c in text]


def decode(ids: Sequence[int]) -> str:
    """The text of ids up to the end of the answer."""
    return "".join(CHARACTERS[i] for i in ids).partition(CHARACTERS[EOS])[0]


@dataclasses.dataclass(frozen=True)
class Lab:
    """What all seeds share: the model's config and the problems, none of them in two splits.

    tune: with the one derivation each is taught by; validation, test: to choose and to report on.
    """

    model: ModelConfig
    tune: list[tuple[Countdown, str]]
    validation: list[tuple[Countdown, Problem]]
    test: list[tuple[Countdown, Problem]]
    batch_size: int

    @classmethod
    def of(cls, config: ConfigDict) -> Lab:
        """Draws the problems; InputError where a derivation may be longer than a row."""
        m, p = config.model, config.problems
        model = ModelConfig(
            "llama",
            len(CHARACTERS),
            m.layers,
            m.width,
            m.ffn,
            m.heads,
            m.heads,
            m.width // m.heads,
            max_position=2 * LONGEST,
            tie_embeddings=True,
        )
        rng, seen = np.random.default_rng(2504), set()
        drawn: list[Countdown] = []
        while len(drawn) < p.tune + p.validation + p.test:
            problem = countdown.draw_problem(rng, p.numbers, p.largest)
            key = tuple(sorted(problem.numbers)), problem.target
            if key not in seen:
                seen.add(key)
                drawn.append(problem)
        tune = [(q, _taught(rng, q)) for q in drawn[: p.tune]]
        longest = max(len(q.prompt) + len(text) for q, text in tune)
        if longest >= LONGEST:
            raise InputError(
                f"a problem and its derivation take {longest} tokens, the model reads "
                f"{LONGEST}: lower problems.numbers"
            )
        rest = [(q, _problem(i, q)) for i, q in enumerate(drawn[p.tune :])]
        return cls(model, tune, rest[: p.validation], rest[p.validation :], config.sweep.batch_size)

    @property
    def abstract(self) -> tree.Tree:
        """Shapes of the parameters."""
        return transformer.abstract_params(self.model, "float32")

    def draw(
        self,
        params: tree.Tree,
        problems: Sequence[Problem],
        num_samples: int,
        sampling: SamplingConfig,
        seed: int,
    ) -> list[list[Answer]]:
        """Samples and grades (`moejax.evals.sweep.Draw`)."""
        prompts = [p.prompt for p in problems for _ in range(num_samples)]
        ids = self.rollout(params, prompts, seed, sampling)
        answers = [self.grade(p.gold, ids[i * num_samples + j])
                   for i, p in enumerate(problems) for j in range(num_samples)]
        return [answers[i * num_samples :][:num_samples] for i in range(len(problems))]

    def grade(self, problem: Countdown, ids: Sequence[int]) -> Answer:
        """An answer's ids read: its derivation, and whether that solves the problem."""
        text = decode(ids)
        return Answer(text, countdown.normalised(text), countdown.solves(problem, text))

    def rollout(
        self,
        params: tree.Tree,
        prompts: Sequence[Sequence[int]],
        seed: int,
        sampling: SamplingConfig = SamplingConfig(1.0),
    ) -> list[list[int]]:
        """One answer a prompt, its end token included."""
        settings = GenerateConfig(
            LONGEST // 2, sampling, stop_ids=(EOS,), seed=seed, batch_size=self.batch_size
        )
        found = generate(prepare(params), self.model, prompts, settings)
        return [c.ids + [EOS] * c.finished for c in found]


def _problem(number: int, problem: Countdown) -> Problem:
    return Problem(f"{number}: {problem.prompt}", tuple(encode(problem.prompt)), problem)


def _taught(rng: np.random.Generator, problem: Countdown) -> str:
    """One derivation that solves a problem, drawn as the base model's were."""
    while (text := _one_way(rng, problem, False)) is None:
        pass
    return text


def rows_of(pairs: Sequence[tuple[Countdown, str]]) -> dict[str, np.ndarray]:
    """A batch for `moejax.train.loss`: problems packed into rows, the loss on derivations."""
    examples = []
    for number, (problem, text) in enumerate(pairs):
        prompt, answer = encode(problem.prompt), [*encode(text), EOS]
        ids = np.array([*prompt, *answer], np.int32)
        counted = np.arange(len(ids)) >= len(prompt)
        examples.append(Example(str(number), (), ids, counted))
    return pack(examples, ROW).batch()


def _of_height(rows: dict[str, np.ndarray], height: int) -> dict[str, np.ndarray]:
    """The first `height` rows; empty ones where there are fewer, so that all batches are alike."""
    lacking = max(0, height - len(rows["tokens"]))
    return {name: np.pad(x[:height], ((0, lacking), (0, 0))) for name, x in rows.items()}


def pretrained(lab: Lab, config: ConfigDict, folder: Path) -> tree.Tree:
    """The base model: trained on an endless stream of problems, each derivation of its own kind.

    A share of derivations (problems.noise) computes right but misses the target, so the base knows
    the form and the arithmetic, and many ways, and is often wrong.
    """
    p, settings = config.problems, config.pretrain
    height = -(-settings.batch_size * 36 // ROW)  # a problem of 3 or 4 numbers takes 31 tokens

    def batches(step: int) -> Mapping[str, np.ndarray]:
        rng = np.random.default_rng([77, step])
        pairs: list[tuple[Countdown, str]] = []
        while len(pairs) < settings.batch_size:
            problem = countdown.draw_problem(rng, int(rng.integers(3, p.numbers + 1)), p.largest)
            noisy = rng.random() < p.noise
            text = _one_way(rng, problem, noisy)
            if text is not None and len(problem.prompt) + len(text) < LONGEST:
                pairs.append((problem, text))
        # What does not fit is left out: there is no end of problems.
        return _of_height(rows_of(pairs), height)

    params = transformer.init_params(lab.model, jax.random.key(0))
    optim = OptimConfig("adamw", settings.lr, "cosine", settings.steps // 20, 1.0)
    train = TrainConfig(settings.steps, optim, log_every=50, save_every=250)
    return fit(train, _loss(lab), params, {}, batches, folder, info=_info("pretrain")).params


def _one_way(rng: np.random.Generator, problem: Countdown, noisy: bool) -> str | None:
    """A derivation of a problem by chance: any one, or one that solves it."""
    for _ in range(1 if noisy else 400):
        steps = countdown.random_steps(rng, problem.numbers)
        if steps is not None and (noisy or steps[-1][3] == problem.target):
            return countdown.write(steps)
    return None


def tuned(
    lab: Lab, config: ConfigDict, base: tree.Tree, seed: int, folder: Path, schedule: str
) -> dict[int, tree.Tree]:
    """SFT on one derivation a problem: {step: parameters}, log-spaced, the last one last."""
    settings = config.sft
    per_epoch = len(lab.tune) // settings.batch_size
    steps = settings.epochs * per_epoch
    spaced = np.geomspace(max(1, per_epoch // 4), steps, config.trajectory)
    kept = sorted({int(round(s)) for s in spaced})
    packed = []
    for epoch in range(settings.epochs):
        order = np.random.default_rng([seed, 5, epoch]).permutation(len(lab.tune))
        for part in np.split(order[: per_epoch * settings.batch_size], per_epoch):
            packed.append(rows_of([lab.tune[number] for number in part]))
    height = max(len(rows["tokens"]) for rows in packed)

    def batches(step: int, params: tree.Tree) -> Mapping[str, np.ndarray]:
        if step in kept:
            save_tree(folder / f"params_{step:06d}.npz", params)
        return _of_height(packed[step], height)

    optim = OptimConfig("adamw", settings.lr, schedule, steps // 50, 1.0)
    train = TrainConfig(steps, optim, seed=seed, log_every=50, save_every=max(1, steps // 4))
    info = dataclasses.replace(_info(f"sft {schedule} {seed}"), on_policy=True)
    last = fit(train, _loss(lab), base, {}, batches, folder, info=info).params
    found = {s: load_tree(folder / f"params_{s:06d}.npz", lab.abstract) for s in kept if s < steps}
    return found | {steps: last}


def reinforced(
    lab: Lab, config: ConfigDict, start: tree.Tree, seed: int, folder: Path
) -> tree.Tree:
    """GRPO on the problems of the tuning: right derivations earn 1."""
    rl = config.rl
    grpo = GrpoConfig(kl_weight=rl.kl_weight)
    settings = RlConfig(rl.prompts, rl.answers, 1, 1, LONGEST // 2, seed)

    def reward(numbers: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float]:
        pairs = zip(numbers, answers, strict=True)
        return [float(lab.grade(lab.tune[n][0], answer).correct) for n, answer in pairs]

    batches = OnPolicy(
        lab.model,
        settings,
        grpo,
        [encode(problem.prompt) for problem, _ in lab.tune],
        Judged(lab.rollout, reward),
        folder / "rollouts",
        reference=start if rl.kl_weight else None,
    )
    optim = OptimConfig("adamw", rl.lr, "constant", 0, 1.0)
    train = TrainConfig(rl.iterations, optim, seed=seed, log_every=5, save_every=10)
    info = dataclasses.replace(_info(f"grpo {folder.name} {seed}"), on_policy=True)
    return fit(train, make_grpo_loss(lab.model, grpo), start, {}, batches, folder, info=info).params


def _loss(lab: Lab) -> Callable[..., Any]:
    return lambda params, frozen, batch, rng: lm_loss(params, lab.model, batch, rng)


def _info(title: str) -> RunInfo:
    return RunInfo(title)


def save_tree(path: Path, params: tree.Tree) -> None:
    """Writes parameters as one .npz file, whole or not at all."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_npz(path, {n: np.asarray(leaf) for n, leaf in tree.flatten(params).items()})


def load_tree(path: Path, like: tree.Tree) -> tree.Tree:
    """Inverse of `save_tree`; InputError where the file is missing or of another model."""
    if not path.is_file():
        raise InputError(f"{path} is missing: remove its folder to tune again")
    found = tree.unflatten(atomic.read_npz(path))
    if tree.diff(tree.abstract(found), tree.abstract(like)):
        raise InputError(f"{path} holds the parameters of another model")
    return jax.tree.map(jax.numpy.asarray, found)
