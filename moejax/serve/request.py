"""What an engine is asked for, what it answers, and how it is set up."""

from __future__ import annotations

import dataclasses

from moejax.core.errors import InputError
from moejax.methods.shadow_mask import check_sparsity
from moejax.models.transformer import ForwardOptions
from moejax.serve.sampling import SamplingConfig

NO_PREDICTOR = "sparsity {:g}: nothing is skipped here, this engine has no predictor (--shadow)"


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How much an engine does at a time; none of it changes what a request is answered.

    Attributes:
      num_slots: rows decoded together. With the same number a row's tokens are the same bits,
        whoever shares its batch.
      max_length: most tokens of a row, prompt and answer; None: what the model reads.
      page_size: tokens per page of the cache; None: 32 on a CPU, 128 elsewhere.
      num_pages: pages in all; None: enough for every slot to be as long as max_length. With fewer,
        requests wait until enough of them are free for all that they may become.
      prefill_chunk: tokens of a prompt read at a time; None: 64 on a CPU, 256 elsewhere.
      num_steps: most tokens per row that are drawn between two looks at what came out.
      max_logprobs: most likely tokens that a request may ask for at each position; None: requests
        cannot have log-probabilities, and nothing is compiled for them.
      max_stop_ids: ids that may end a row.
      options: how to compute; the cache has its compute_dtype.
    """

    num_slots: int = 8
    max_length: int | None = None
    page_size: int | None = None
    num_pages: int | None = None
    prefill_chunk: int | None = None
    num_steps: int = 8
    max_logprobs: int | None = None
    max_stop_ids: int = 8
    options: ForwardOptions = ForwardOptions()

    def __post_init__(self):
        for name in ("num_slots", "max_length", "page_size", "num_pages", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, got {value}")
        if self.num_steps < 1:
            raise InputError(f"num_steps must be 1 or more, got {self.num_steps}")

    def most_ended(self, is_waiting: bool) -> int:
        """Rows that may end before their slots are filled again, if others wait for them.

        With many slots one ends at nearly every step, and a call for each step costs more than the
        empty slots do.
        """
        return max(1, self.num_slots // 16) if is_waiting else self.num_slots


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
      prompt: token ids.
      max_new_tokens: upper bound on each answer; it also ends where the row is full.
      sampling: how each token is drawn.
      seed, index: sample j draws its t-th token with the key
        fold_in(fold_in(key(seed), index + j), t).
      num_samples: answers to this prompt, which is read once for all of them.
      stop_ids: ids that end an answer; they are not part of it.
      stop: strings that end an answer, wherever tokens begin and end; cut from its text.
      num_logprobs: how many most likely tokens to report at each position besides the one drawn;
        None: no log-probabilities.
      adapter: a name of what an engine's owner has laid over the parameters; None: nothing.
      sources: names of those who lend to a grafted model; None: all of them, (): none.
      sparsity: share of heads and of neurons not computed, by an engine that has a predictor; 0:
        the dense model; None: the engine's own.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    index: int = 0
    num_samples: int = 1
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    adapter: str | None = None
    sources: tuple[str, ...] | None = None
    sparsity: float | None = None

    def __post_init__(self):
        for name in ("max_new_tokens", "num_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not -(2**31) <= self.seed < 2**31:
            raise InputError(f"seed must be a number of 32 bits, got {self.seed}")
        if any(not text for text in self.stop):
            raise InputError("a stop string is empty: leave it out")
        if self.sparsity is not None:
            check_sparsity(self.sparsity)


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """ln p of a drawn token in the model's own distribution (temperature 1, uncut), in nats.

    top: the most likely tokens there as (id, ln p), best first.
    """

    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Update:
    """What came to one sample of a request since its last update.

    Attributes:
      request_id, sample: whose.
      ids: new tokens, stop ids left out.
      text: new text, where the engine can decode; nothing of a stop string is in it.
      logprobs: one per id, where the request wants them.
      finish: None while there is more to come; "stop" after a stop id or string; "length".
    """

    request_id: int
    sample: int
    ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None


@dataclasses.dataclass
class Answer:
    """All updates of one sample put together."""

    ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish: str | None = None

    def add(self, update: Update) -> None:
        self.ids += update.ids
        self.text += update.text
        self.logprobs += update.logprobs
        self.finish = update.finish
