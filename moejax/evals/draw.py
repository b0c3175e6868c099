"""A task's problems answered by parameters in hand and graded: what sweeps and RL share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.evals.run import encode_prompt
from moejax.evals.scores import UNSCORED
from moejax.evals.sweep import Answer, Problem
from moejax.evals.tasks.base import Grade, Grading, Item, Task, cut
from moejax.io.tokenizer import Tokenizer
from moejax.models.config import ModelConfig
from moejax.serve.generate import Completion, GenerateConfig, generate, prepare
from moejax.serve.likelihood import log_likelihoods
from moejax.serve.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class TaskSampler:
    """Asks, decodes, extracts and grades.

    Attributes:
      model, tokenizer: whose parameters are given later.
      task, form: what is asked and how.
      drawing: lengths, stop ids, batch size; sampling and seed come with each call.
      grading: how programs are run.
      score: also give each sample its mean log-probability, by one more forward pass.
    """

    model: ModelConfig
    tokenizer: Tokenizer
    task: Task
    form: str
    drawing: GenerateConfig
    grading: Grading = Grading()
    score: bool = False

    def problems(self, items: Sequence[Item], *, strict: bool = False) -> list[Problem]:
        """Items with their prompts as ids.

        strict: InputError for an item whose tests share a process with the candidate, which could
        tamper with them: no reward may rest on it.
        """
        weak = [item for item in items if item.weak]
        if strict and weak:
            raise InputError(
                f"{len(weak)} of {len(items)} problems of {self.task.name} have tests that the "
                f"candidate could tamper with ({weak[0].id}: {weak[0].weak}): leave them out"
            )
        return [
            Problem(item.id, tuple(encode_prompt(self.tokenizer, self._asked(item))), item)
            for item in items
        ]

    def __call__(
        self,
        params: tree.Tree,
        problems: Sequence[Problem],
        num_samples: int,
        sampling: SamplingConfig,
        seed: int,
    ) -> list[list[Answer]]:
        """num_samples answers to each problem (`moejax.evals.sweep.Draw`)."""
        params = prepare(params, self.drawing.options.compute_dtype)
        asked = [problem for problem in problems for _ in range(num_samples)]
        found = self.complete(params, [p.prompt for p in asked], sampling, seed)
        graded = self.grade(asked, [completion.ids for completion in found])
        scores = self._scores(params, asked, found) if self.score else [None] * len(asked)
        answers = [
            Answer(text, answer, grade.passed, score)
            for (text, answer, grade), score in zip(graded, scores, strict=True)
        ]
        return [answers[i * num_samples :][:num_samples] for i in range(len(problems))]

    def complete(
        self,
        params: tree.Tree,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seed: int,
    ) -> list[Completion]:
        """One answer a prompt."""
        settings = dataclasses.replace(self.drawing, sampling=sampling, seed=seed)
        return generate(params, self.model, prompts, settings)

    def grade(
        self, asked: Sequence[Problem], ids: Sequence[Sequence[int]]
    ) -> list[tuple[str, str | None, Grade]]:
        """(completion, what a vote counts, verdict) of every answer.

        A program without an answer of its own votes with its text. InputError where this machine
        cannot grade.
        """
        texts, pairs = [], []
        for problem, tokens in zip(asked, ids, strict=True):
            prompt = self._asked(problem.gold)
            text = cut(self.tokenizer.decode(tokens), prompt.stop)
            text = prompt.prefix + text if prompt.message is not None else text
            texts.append(text)
            pairs.append((problem.gold, self.task.extract(problem.gold, self.form, text)))
        grades = self.task.grade(pairs, self.grading)
        for (item, _), grade in zip(pairs, grades, strict=True):
            if grade.verdict == UNSCORED:
                raise InputError(f"{item.id} cannot be graded here: {grade.reason}")
        votes = [
            grade.answer if grade.answer is not None or not self.task.executes else program or None
            for (_, program), grade in zip(pairs, grades, strict=True)
        ]
        return list(zip(texts, votes, grades, strict=True))

    def _asked(self, item: Item):
        return self.task.forms[self.form](item)

    def _scores(self, params, asked, found) -> list[float]:
        pairs = [(p.prompt, done.ids) for p, done in zip(asked, found, strict=True)]
        rows = log_likelihoods(params, self.model, pairs, options=self.drawing.options)
        return [row.log_prob / max(1, len(row.token_log_probs)) for row in rows]
