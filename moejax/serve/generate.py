"""Cached generation: prompts in, answers out, by way of the engine.

Every row has its own settings of length and its own random key, so an answer does not depend on
which prompts share its batch (`moejax.serve.engine`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions
from moejax.serve.engine import Engine
from moejax.serve.prepare import bucket, check_prompts, context_length, power_of_two, prepare
from moejax.serve.request import Answer, EngineConfig, Request
from moejax.serve.sampling import SamplingConfig

__all__ = ["Completion", "GenerateConfig", "generate", "stream"]
__all__ += ["bucket", "check_prompts", "context_length", "prepare"]  # from prepare.py


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What to generate.

    Attributes:
      max_new_tokens: upper bound on each answer; a row also ends where the model's context does.
      sampling: how each token is drawn.
      stop_ids: ids that end an answer; they are not part of it.
      seed: an int32; row i draws its t-th token with the key fold_in(fold_in(key(seed), i), t),
        whatever the batch it shares.
      batch_size: most rows decoded at a time.
      options: how to compute; the cache has its compute_dtype.
    """

    max_new_tokens: int = 128
    sampling: SamplingConfig = SamplingConfig()
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    batch_size: int = 32
    options: ForwardOptions = ForwardOptions()

    def __post_init__(self):
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer's ids without its stop id; finished: whether a stop id or string ended it.

    text: theirs, up to a stop string, where the engine decodes.
    """

    ids: list[int]
    finished: bool
    text: str = ""

    @classmethod
    def of(cls, answer: Answer) -> Completion:
        """An engine's answer."""
        return cls(answer.ids, answer.finish == "stop", answer.text)


def generate(
    params: tree.Tree,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    settings: GenerateConfig = GenerateConfig(),
    *,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Completion]:
    """Continues every prompt: x_t ~ p(x | prompt, x_<t) after `sampling`'s cuts.

    Rows that end make room for the next prompts at once, and each answer is what the prompt alone
    would give (up to float rounding between batch sizes). The room for a row is rounded up to a
    `bucket`, so that few programs are ever compiled.

    With "dynamic" rope, whose frequencies depend on a text's length, a row's frequencies are fixed
    for the longest text it may become, its prompt plus max_new_tokens: the keys in its cache were
    turned by them. Up to `original_max_position` that changes nothing.

    Args:
      params: the model's tree, or what `prepare` makes of it (worth keeping for many calls).
      config: the model.
      prompts: token ids, none of them empty.
      settings: what to generate.
      progress: called after each round with (answers done, answers in all, tokens drawn).

    Raises:
      InputError: an empty prompt, ids outside the vocabulary, a prompt that leaves no room in the
        model's context.
    """
    check_prompts(config, prompts)
    if not prompts:
        return []
    num_slots = min(settings.batch_size, len(prompts))
    longest = max(map(len, prompts)) + settings.max_new_tokens
    max_length = bucket(min(longest, context_length(config)))
    engine = _engine(params, config, settings, num_slots, max_length)
    requests, row = [], 0
    for prompt, equal in itertools.groupby(map(tuple, prompts)):  # neighbours are read once
        number = len(list(equal))
        requests.append(_request(prompt, settings, row, number))
        row += number
    return [Completion.of(a) for answers in engine.run(requests, progress) for a in answers]


def stream(
    params: tree.Tree,
    config: ModelConfig,
    prompt: Sequence[int],
    settings: GenerateConfig = GenerateConfig(),
    *,
    every: int = 4,
) -> Iterator[list[int]]:
    """Yields the ids that `generate` would give for one prompt, at most `every` at a time."""
    check_prompts(config, [prompt])
    # A conversation grows from call to call: doubling its room keeps it in compiled programs.
    longest = min(len(prompt) + settings.max_new_tokens, context_length(config))
    engine = _engine(params, config, settings, 1, power_of_two(longest, least=512), every)
    engine.submit(_request(prompt, settings, 0))
    while engine.is_busy:
        for update in engine.step():
            if update.ids:
                yield list(update.ids)


# -- inside ----------------------------------------------------------------------------------------


def _engine(
    params,
    config: ModelConfig,
    settings: GenerateConfig,
    num_slots: int,
    max_length: int,
    num_steps: int = 32,
) -> Engine:
    engine_settings = EngineConfig(
        num_slots=num_slots,
        max_length=max_length,
        num_steps=num_steps,
        max_stop_ids=power_of_two(len(settings.stop_ids) or 1, least=8),
        options=settings.options,
    )
    return Engine(params, config, engine_settings)


def _request(
    prompt: Sequence[int], settings: GenerateConfig, row: int, num_samples: int = 1
) -> Request:
    return Request(
        tuple(prompt),
        settings.max_new_tokens,
        settings.sampling,
        settings.seed,
        row,
        num_samples,
        settings.stop_ids,
    )
