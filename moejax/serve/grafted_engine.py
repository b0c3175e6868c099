"""A target with bridges behind the server: the calls of an engine, one token of each row in turn.

Rows are not batched: every row has the caches of its own text (`moejax.serve.grafted`), and a step
draws one token of each. A request's `sources` names who lends to it; others are not read at all.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.config import ModelConfig
from moejax.serve.grafted import Drawn, Grafted, GraftedText
from moejax.serve.prepare import check_prompts, check_room, context_length
from moejax.serve.request import NO_PREDICTOR, Answer, EngineConfig, Request, TokenLogprob, Update
from moejax.serve.text import Decode, TextStream, add_text


@dataclasses.dataclass
class _Row:
    """One sample being answered."""

    request_id: int
    sample: int
    request: Request
    budget: int
    drawn: Iterator[Drawn]
    text: TextStream | None
    count: int = 0


class GraftedEngine:
    """Answers requests as `moejax.serve.engine.Engine` does, with what sources lend.

    Args:
      model: target and sources. settings: num_slots, max_length, max_logprobs and options are used.
      decode_text: ids to text; needed for stop strings, and for updates to have text.
    """

    adapters: tuple[str, ...] = ()

    def __init__(self, model: Grafted, settings: EngineConfig, decode_text: Decode | None = None):
        self.model = dataclasses.replace(model, options=settings.options)
        self.settings, self.config = settings, model.target
        self._decode_text = decode_text
        most = context_length(model.target)
        self.max_length = min(settings.max_length or most, most)
        self._waiting: collections.deque[tuple[int, int, Request]] = collections.deque()
        self._rows: list[_Row] = []
        self._next_id = 0

    @property
    def is_busy(self) -> bool:
        """Whether any request is waiting or being answered."""
        return bool(self._waiting or self._rows)

    @property
    def num_running(self) -> int:
        """Rows being answered."""
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Samples that have no row yet."""
        return len(self._waiting)

    def check(self, request: Request) -> None:
        """Raises InputError for a request that this engine can never answer."""
        config: ModelConfig = self.config
        check_prompts(config, [request.prompt])
        check_room(request.prompt, self.max_length)
        if request.adapter is not None:
            raise InputError(f"adapter {request.adapter!r} is unknown: a grafted model has none")
        if request.sparsity:
            raise InputError(NO_PREDICTOR.format(request.sparsity))
        if request.stop and self._decode_text is None:
            raise InputError("stop strings need an engine that decodes text: give it decode_text")
        most = self.settings.max_logprobs or 0
        if request.num_logprobs is not None and request.num_logprobs > most:
            raise InputError(f"{request.num_logprobs} log-probabilities are wanted, at most {most}")
        self.model.chosen(request.sources)

    def report(self) -> dict[str, Any]:
        """What else the server should tell of its health."""
        return {}

    def warm(self) -> None:
        """Compiles what requests need."""
        self.run([Request((0,) * 2, 2, num_logprobs=self.settings.max_logprobs and 1)])

    @contextlib.contextmanager
    def laid(self, adapter: str | None) -> Iterator[tree.Tree]:
        """Refuses: likelihoods of a prompt would be those of the target alone."""
        raise InputError("a grafted model does not score prompts: leave echo or logprobs out")
        yield {}

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id; InputError for what `check` refuses."""
        self.check(request)
        self._next_id += 1
        self._waiting += [(self._next_id, j, request) for j in range(request.num_samples)]
        return self._next_id

    def cancel(self, request_id: int) -> None:
        """Forgets a request; unknown ids are ignored."""
        self._waiting = collections.deque(w for w in self._waiting if w[0] != request_id)
        self._rows = [row for row in self._rows if row.request_id != request_id]

    def step(self) -> list[Update]:
        """Starts rows while there are slots, then draws one token of each."""
        while self._waiting and len(self._rows) < self.settings.num_slots:
            self._rows.append(self._start(*self._waiting.popleft()))
        updates = [self._update(row) for row in self._rows]
        ended = {(u.request_id, u.sample) for u in updates if u.finish is not None}
        self._rows = [r for r in self._rows if (r.request_id, r.sample) not in ended]
        return updates

    def run(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """Answers all, in the order of requests and samples."""
        places = {self.submit(request): place for place, request in enumerate(requests)}
        found = [[Answer() for _ in range(r.num_samples)] for r in requests]
        while self.is_busy:
            for update in self.step():
                found[places[update.request_id]][update.sample].add(update)
        return found

    def _start(self, request_id: int, sample: int, request: Request) -> _Row:
        budget = min(request.max_new_tokens, self.max_length - len(request.prompt))
        text = GraftedText(
            self.model, request.prompt, budget, request.sources, room=self.max_length
        )
        key = jax.random.fold_in(jax.random.key(request.seed), request.index + sample)
        stream = TextStream(self._decode_text, request.stop) if self._decode_text else None
        drawn = text.draw(request.sampling, key, request.stop_ids)
        return _Row(request_id, sample, request, budget, drawn, stream)

    def _update(self, row: _Row) -> Update:
        request, drawn = row.request, next(row.drawn)
        row.count += 1
        ids: list[int] = [drawn.id]
        finish = "length" if row.count >= row.budget else None
        if drawn.id in request.stop_ids:
            finish, ids = "stop", []
        text, ids, finish = add_text(row.text, ids, finish)
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.num_logprobs is not None and ids:
            logprobs = (_logprob(drawn, request.num_logprobs),)
        return Update(row.request_id, row.sample, tuple(ids), text, logprobs, finish)


def _logprob(drawn: Drawn, num_top: int) -> TokenLogprob:
    log_probs_V: Any = jax.nn.log_softmax(drawn.logits_V)
    values, ids = jax.lax.top_k(log_probs_V, max(1, num_top))
    pairs = zip(ids.tolist()[:num_top], values.tolist()[:num_top], strict=True)
    return TokenLogprob(float(jnp.asarray(log_probs_V)[drawn.id]), tuple(pairs))
