"""A moejax model for lm-evaluation-harness (the `eval` extra): its tasks, our devices.

    lm = harness_model(moejax.load("runs/merged"))
    lm_eval.simple_evaluate(model=lm, tasks=["piqa"])

Log-likelihoods are ours (serve/likelihood.py); contexts and continuations are tokenised by the
harness's own rule; texts longer than the model reads are split into its disjoint windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.evals.run import Question, answer_fn
from moejax.evals.tasks.base import cut
from moejax.evals.text_likelihood import Encoding
from moejax.io.tokenizer import Tokenizer
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions
from moejax.serve.generate import GenerateConfig, context_length, prepare
from moejax.serve.likelihood import log_likelihoods
from moejax.serve.sampling import SamplingConfig


@dataclasses.dataclass(frozen=True)
class HarnessConfig:
    """How the harness's requests are computed.

    Attributes:
      batch_size: rows generated at a time.
      max_batch_tokens: tokens scored at a time.
      max_new_tokens: of an answer, where the task does not say.
      seed: of sampled answers.
      add_bos: put BOS before every context (Gemma's tokenizers want it).
      options: how to compute.
    """

    batch_size: int = 16
    max_batch_tokens: int = 2048
    max_new_tokens: int = 256
    seed: int = 0
    add_bos: bool = False
    options: ForwardOptions = ForwardOptions()


def harness_model(
    params: tree.Tree,
    config: ModelConfig,
    tokenizer: Tokenizer,
    settings: HarnessConfig = HarnessConfig(),
    name: str = "moejax",
) -> Any:
    """Returns the model as an `lm_eval.api.model.TemplateLM`.

    Raises:
      InputError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM  # an extra, and slow to import
    except ImportError:
        raise InputError("the harness needs lm-eval: pip install 'moejax[eval]'") from None
    params = jax.device_put(params)
    encoding = Encoding(tokenizer, context_length(config), settings.add_bos)
    scoring: dict[str, Any] = {
        "max_batch_tokens": settings.max_batch_tokens,
        "options": settings.options,
    }
    ready: list[tree.Tree] = []  # the tree as decoding reads it, made when first needed

    class MoejaxLM(TemplateLM):
        """The adapter; every number comes from moejax."""

        tokenizer_name = name
        max_length = encoding.max_tokens
        max_gen_toks = settings.max_new_tokens

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_ids[0]

        @property
        def prefix_token_id(self) -> int:
            return encoding.prefix_id

        def tok_encode(self, string: str, add_special_tokens=None, **kwargs: Any) -> list[int]:
            return (
                tokenizer.encode(string) if add_special_tokens is False else encoding.encode(string)
            )

        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs: Any):
            pairs = []
            for _, context, continuation in requests:
                room = encoding.max_tokens + 1 - len(continuation)
                pairs.append((context[-max(room, 1) :], continuation))
            with _shown("moejax: scored", len(pairs), disable_tqdm) as progress:
                found = log_likelihoods(params, config, pairs, progress=progress, **scoring)
            return [(one.log_prob, one.greedy) for one in found]

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            windows = [encoding.windows(request.args[0]) for request in requests]
            pairs = [pair for part in windows for pair in part]
            with _shown("moejax: scored", len(pairs), disable_tqdm) as progress:
                found = iter(log_likelihoods(params, config, pairs, progress=progress, **scoring))
            return [sum(next(found).log_prob for _ in part) for part in windows]

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            if not ready:
                ready.append(prepare(params, settings.options.compute_dtype))
            asked = [request.args for request in requests]
            with _shown("moejax: answered", len(asked), disable_tqdm) as progress:
                return _answers(ready[0], config, encoding, settings, asked, progress)

        def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
            return tokenizer.apply_chat(chat_history, add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return tokenizer.chat_template if chat_template else None

    return MoejaxLM()


def _alike(settings: Sequence[dict]) -> list[tuple[dict, list[int]]]:
    """Requests grouped by how they are to be answered, in the order of their first."""
    groups: dict[str, tuple[dict, list[int]]] = {}
    for i, how in enumerate(settings):
        groups.setdefault(repr(sorted(how.items(), key=str)), (how, []))[1].append(i)
    return list(groups.values())


def _answers(
    params: tree.Tree,
    config: ModelConfig,
    encoding: Encoding,
    settings: HarnessConfig,
    asked: Sequence[tuple[str, dict]],
    progress: Callable[[int, int], None],
) -> list[str]:
    """Answers to (text, gen_kwargs), up to what is to end them."""
    answers: dict[int, str] = {}
    for kwargs, indices in _alike([how for _, how in asked]):
        texts = [asked[i][0] for i in indices]
        drawing = _drawing(encoding, settings, kwargs, len(texts))
        answer = answer_fn(params, config, encoding.tokenizer, drawing)
        questions = _questions(encoding, drawing, texts, kwargs)
        longest = max(len(question.ids) for question in questions)
        for place, _, one in answer(questions, longest):
            answers[indices[place]] = cut(one.text, questions[place].stop)
            progress(len(answers), len(asked))
    return [answers[i] for i in range(len(asked))]


def _drawing(
    encoding: Encoding, settings: HarnessConfig, how: dict[str, Any], num_texts: int
) -> GenerateConfig:
    """How the harness's `gen_kwargs` want answers to be drawn."""
    most = int(how.get("max_gen_toks") or how.get("max_new_tokens") or settings.max_new_tokens)
    if most >= encoding.max_tokens:
        raise InputError(f"{most} new tokens leave no room in the {encoding.max_tokens} read")
    sampled = how.get("do_sample", (how.get("temperature") or 0) > 0)
    temperature = float(how.get("temperature") or 1.0) if sampled else 0.0
    return GenerateConfig(
        max_new_tokens=most,
        sampling=SamplingConfig(temperature=temperature, top_p=float(how.get("top_p") or 1.0)),
        stop_ids=tuple(encoding.tokenizer.eos_ids),
        seed=settings.seed,
        batch_size=min(settings.batch_size, num_texts),
        options=settings.options,
    )


def _questions(
    encoding: Encoding, drawing: GenerateConfig, texts: Sequence[str], how: dict[str, Any]
) -> list[Question]:
    """The texts, cut on the left to what leaves room for an answer, and what ends one."""
    until = how.get("until") or []
    stops = tuple(filter(None, [until] if isinstance(until, str) else until))
    room = encoding.max_tokens - drawing.max_new_tokens
    prompts = [(encoding.encode(text) or [encoding.prefix_id])[-room:] for text in texts]
    return [Question(tuple(ids), stops, index) for index, ids in enumerate(prompts)]


@contextmanager
def _shown(what: str, total: int, silent: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar of the harness's own kind; yields what takes (done, total)."""
    from tqdm import tqdm  # comes with lm-eval

    with tqdm(total=total, desc=what, disable=silent) as bar:
        yield lambda done, total: bar.update(done - bar.n)
