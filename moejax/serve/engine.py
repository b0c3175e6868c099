"""Continuous batching: many requests through one model, each slot refilled as its row finishes."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.platform import platform
from moejax.methods.esft_delta import Adapters, Delta
from moejax.models.cache import init_pool
from moejax.models.config import ModelConfig
from moejax.serve.engine_pages import PagePool
from moejax.serve.engine_programs import Drawn, Plan, copy_pages, decode, prefill
from moejax.serve.engine_rows import Group, Row, clear_slot, empty_rows, fill_slot, update_of
from moejax.serve.prepare import (
    cache_place,
    check_prompts,
    check_room,
    context_length,
    prepare,
)
from moejax.serve.request import NO_PREDICTOR, Answer, EngineConfig, Request, Update
from moejax.serve.text import Decode, TextStream

# Tokens of prompts read between two draws while others are being answered.
_PREFILL_TOKENS = 512
# Shorter chunks than this are not faster.
_LEAST_CHUNK = 16


class Engine:
    """Decodes up to `num_slots` rows together over a paged cache; not for several threads at once.

    `submit` requests at any time, `step` until nothing `is_busy`, `cancel` what nobody waits for;
    or `run` them all. The parameters are inputs of the compiled programs: another engine with
    others of the same shapes, or `params` set anew between requests, compiles nothing.

    Args:
      params: the model's tree, stacked or `prepare`d; on a mesh, the cache lies there too, heads
        over its "tensor" axis where they divide.
      config: the model.
      settings: how much at a time.
      decode_text: ids to text; needed for stop strings, and for updates to have text.
      deltas: by name, what a request's `adapter` lays over the parameters. One is laid at a time:
        requests of another wait until the rows before them have ended, so in order of arrival.
        The engine then changes `params` in place: nobody else may use them.
    """

    def __init__(
        self,
        params: tree.Tree,
        config: ModelConfig,
        settings: EngineConfig = EngineConfig(),
        decode_text: Decode | None = None,
        deltas: Mapping[str, Delta] | None = None,
    ):
        if settings.options.parallel is not None:
            raise InputError(
                "an engine computes where the parameters lie: leave options.parallel out and load "
                "them onto a mesh"
            )
        self.config, self.settings = config, settings
        self.params = prepare(params, settings.options.compute_dtype)
        laid_over = self.params if deltas else {"layers": {}}
        self._adapters = Adapters.of(laid_over, config, deltas or {})
        self._decode_text = decode_text
        on_cpu = platform() == "cpu"
        self._chunk = settings.prefill_chunk or (64 if on_cpu else 256)
        self.page_size = settings.page_size or (32 if on_cpu else 128)
        # What the model reads bounds a request; the table of pages may be longer.
        self._pages_per_row = -(-(settings.max_length or context_length(config)) // self.page_size)
        self.max_length = min(self._pages_per_row * self.page_size, context_length(config))
        if settings.max_length is not None:
            self.max_length = min(self.max_length, settings.max_length)
        # One more per slot: samples of one prompt copy the page in which it ends.
        num_pages = settings.num_pages or settings.num_slots * (self._pages_per_row + 1)
        self._pages = PagePool(num_pages)
        self._num_pages = num_pages
        self._plan = Plan(
            config,
            settings.options,
            settings.num_steps,
            settings.max_logprobs,
            cache_place(self.params, config),
        )
        pool = init_pool(config, num_pages, self.page_size, settings.options.compute_dtype)
        self._pool = pool if self._plan.place is None else jax.device_put(pool, self._plan.place)
        self._state = empty_rows(settings.num_slots, self._pages_per_row, settings.max_stop_ids)
        self._rows: list[Row | None] = [None] * settings.num_slots
        self._waiting: collections.deque[Group] = collections.deque()
        self._reading: list[Group] = []
        self._next_id = 0

    # -- what a caller does ------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether any request is waiting or being answered."""
        return bool(self._waiting) or any(row is not None for row in self._rows)

    @property
    def num_running(self) -> int:
        """Slots in use."""
        return sum(row is not None for row in self._rows)

    @property
    def num_waiting(self) -> int:
        """Samples without a slot yet."""
        return sum(g.request.num_samples - g.num_admitted for g in self._waiting)

    @property
    def num_free_pages(self) -> int:
        return self._pages.num_free

    def check(self, request: Request) -> None:
        """Raises InputError for a request that this engine can never answer."""
        check_prompts(self.config, [request.prompt])
        check_room(request.prompt, self.max_length)
        if request.adapter is not None and request.adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise InputError(f"adapter {request.adapter!r} is unknown: this engine has {known}")
        if request.sources:
            raise InputError(f"source {request.sources[0]!r} is unknown: this model has no bridge")
        if request.sparsity and self._plan.sizes is None:
            raise InputError(NO_PREDICTOR.format(request.sparsity))
        if request.stop and self._decode_text is None:
            raise InputError("stop strings need an engine that decodes text: give it decode_text")
        if len(request.stop_ids) > self.settings.max_stop_ids:
            raise InputError(
                f"{len(request.stop_ids)} stop ids and this engine has room for "
                f"{self.settings.max_stop_ids}: raise max_stop_ids"
            )
        most = self.settings.max_logprobs
        if request.num_logprobs is not None and (most is None or request.num_logprobs > most):
            raise InputError(
                f"{request.num_logprobs} log-probabilities are wanted per token and this engine "
                f"reports {'none' if most is None else f'at most {most}'}: set max_logprobs"
            )
        needed = self._num_needed(request, self._budget(request))
        if needed > self._num_pages:
            raise InputError(
                f"the request may need {needed} pages and the cache has {self._num_pages}: lower "
                "max_new_tokens or raise num_pages"
            )

    def report(self) -> dict[str, Any]:
        """What else the server should tell of its health."""
        return {}

    def warm(self) -> None:
        """Compiles what requests need."""
        self.run([Request((0,) * 2, 2, num_logprobs=self.settings.max_logprobs and 1, sparsity=0)])

    @property
    def adapters(self) -> list[str]:
        """Names that a request's `adapter` may have."""
        return self._adapters.names

    @contextlib.contextmanager
    def laid(self, adapter: str | None) -> Iterator[tree.Tree]:
        """The parameters with an adapter, for something else than a request; between two steps."""
        before = self._adapters.name
        try:
            self._lay(adapter)
            yield self.params
        finally:
            self._lay(before)

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id; InputError for what `check` refuses."""
        self.check(request)
        self._next_id += 1
        self._waiting.append(Group(self._next_id, request, self._budget(request)))
        return self._next_id

    def cancel(self, request_id: int) -> None:
        """Forgets a request and frees its slots and pages; unknown ids are ignored."""
        for group in [g for g in self._waiting if g.request_id == request_id]:
            self._waiting.remove(group)
            self._let_go(group)
        for slot, row in enumerate(self._rows):
            if row is not None and row.group.request_id == request_id:
                self._free(slot)

    def step(self) -> list[Update]:
        """Fills free slots, reads some of their prompts, draws up to `num_steps` tokens a row."""
        self._admit()
        self._read_prompts()
        if all(self._state.finished_B):
            return []
        steps_left = np.where(self._state.finished_B, 0, self._state.limit_B - self._state.count_B)
        num_steps = min(self.settings.num_steps, int(steps_left.max()))
        return self._take(self._draw(num_steps))

    def answers(
        self,
        requests: Sequence[Request],
        progress: Callable[[int, int, int], None] | None = None,
    ) -> Iterator[tuple[int, int, Answer]]:
        """Answers all and yields (place among the requests, sample, answer) as each is complete.

        progress: called after each step with (samples done, samples in all, tokens drawn).
        InputError while it is busy, and for what `check` refuses, before anything is computed.
        """
        if self.is_busy:
            raise InputError("the engine is busy with other requests: submit these and step")
        for request in requests:
            self.check(request)
        places = {self.submit(request): place for place, request in enumerate(requests)}
        parts: dict[tuple[int, int], Answer] = collections.defaultdict(Answer)
        total = sum(request.num_samples for request in requests)
        done = num_tokens = 0
        try:
            while done < total:
                for update in self.step():
                    key = places[update.request_id], update.sample
                    parts[key].add(update)
                    num_tokens += len(update.ids)
                    if update.finish is not None:
                        done += 1
                        yield *key, parts.pop(key)
                if progress is not None:
                    progress(done, total, num_tokens)
        finally:
            for request_id in places:  # nothing is left of an interrupted run
                self.cancel(request_id)

    def run(
        self,
        requests: Sequence[Request],
        progress: Callable[[int, int, int], None] | None = None,
    ) -> list[list[Answer]]:
        """`answers` in the order of requests and samples."""
        found = [[Answer()] * request.num_samples for request in requests]
        for place, sample, answer in self.answers(requests, progress):
            found[place][sample] = answer
        return found

    # -- slots and pages ---------------------------------------------------------------------------

    def _budget(self, request: Request) -> int:
        return min(request.max_new_tokens, self.max_length - len(request.prompt))

    def _num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _num_needed(self, request: Request, budget: int) -> int:
        """Pages with which the request can be answered, one sample at a time."""
        num_kept = len(request.prompt) - 1
        needed = self._num_pages_for(num_kept + budget)
        # Several samples copy the page in which the prompt ends.
        return needed + (request.num_samples > 1 and num_kept % self.page_size > 0)

    def _admit(self) -> None:
        """Gives free slots to waiting samples, in order, while there are pages for them."""
        for slot, row in enumerate(self._rows):
            if row is not None:
                continue
            if not self._waiting or not self._is_laid(self._waiting[0].request.adapter):
                return
            if not self._admit_one(slot, self._waiting[0]):
                return
            if self._waiting[0].num_admitted == self._waiting[0].request.num_samples:
                self._let_go(self._waiting.popleft())

    def _is_laid(self, adapter: str | None) -> bool:
        """Lays an adapter if no row is still answered with another; whether it then is."""
        if self._adapters.name != adapter and not self.num_running:
            self._lay(adapter)
        return self._adapters.name == adapter

    def _lay(self, adapter: str | None) -> None:
        if self._adapters.name != adapter:
            self.params = self._adapters.use(adapter)

    def _admit_one(self, slot: int, group: Group) -> bool:
        request, num_kept = group.request, group.num_kept
        num_full, ends_within = divmod(num_kept, self.page_size)
        num_own = self._num_pages_for(num_kept + group.budget) - num_full
        takes_over = request.num_samples == 1 and ends_within > 0
        num_wanted = num_own - takes_over
        if group.pages is None:
            num_prompt = self._num_pages_for(num_kept)
            if num_prompt + num_wanted > self._pages.num_free:
                return False
            group.pages = self._pages.take(num_prompt)
            self._reading.append(group)
        elif num_wanted > self._pages.num_free:
            return False
        own = self._pages.take(num_wanted)
        shared = group.pages[: num_full + takes_over]
        self._pages.share(shared)
        copied = ends_within > 0 and not takes_over
        row = Row(
            group,
            group.num_admitted,
            [*shared, *own],
            (group.pages[num_full], own[0]) if copied else None,
            TextStream(self._decode_text, request.stop) if self._decode_text else None,
        )
        self._rows[slot] = row
        if copied:  # kept until it is copied
            self._pages.share(group.pages[num_full:])
        group.num_admitted += 1
        fill_slot(self._state, slot, row)
        return True

    def _let_go(self, group: Group) -> None:
        """The group itself needs its pages no more; its rows keep theirs."""
        if group.pages is not None:
            self._pages.give_back(group.pages)

    def _free(self, slot: int) -> None:
        row = self._rows[slot]
        assert row is not None
        self._pages.give_back(row.pages)
        if row.to_copy is not None:
            self._pages.give_back(row.to_copy[:1])
        self._rows[slot] = None
        clear_slot(self._state, slot)
        if not any(r is not None and r.group is row.group for r in self._rows):
            self._reading = [group for group in self._reading if group is not row.group]

    # -- the programs ------------------------------------------------------------------------------

    def _read_prompts(self) -> None:
        """Reads prompts chunk by chunk, not too many tokens at a time if others wait for theirs."""
        budget = _PREFILL_TOKENS if not all(self._state.finished_B) else None
        while self._reading and (budget is None or budget > 0):
            group = self._reading[0]
            if group.is_read:
                self._reading.pop(0)
                continue
            self._read_chunk(group)
            if budget is not None:
                budget -= self._chunk
        copies = []
        for slot, row in enumerate(self._rows):
            if row is not None and row.group.is_read and not row.started:
                if row.to_copy is not None:
                    copies.append(row.to_copy)
                row.started = True
                self._state.finished_B[slot] = False
        if copies:
            pairs = np.full((self.settings.num_slots, 2), self._num_pages, np.int32)
            pairs[: len(copies)] = copies
            self._pool = copy_pages(self._plan, self._pool, pairs[:, 0], pairs[:, 1])
            self._pages.give_back([source for source, _ in copies])
            for row in self._rows:
                if row is not None and row.started:
                    row.to_copy = None

    def _read_chunk(self, group: Group) -> None:
        assert group.pages is not None
        first, prompt = group.num_read, group.request.prompt
        num_tokens = min(self._chunk, group.num_kept - first)
        # The end of a prompt is padded to a quarter of a chunk: four programs at most, and which
        # of them reads it depends on the prompt alone.
        step = max(_LEAST_CHUNK, self._chunk // 4)
        tokens_BT = np.zeros((1, min(self._chunk, -(-num_tokens // step) * step)), np.int32)
        tokens_BT[0, :num_tokens] = prompt[first : first + num_tokens]
        pages_BP = np.zeros((1, self._pages_per_row), np.int32)
        pages_BP[0, : len(group.pages)] = group.pages
        numbers = first, num_tokens, len(prompt) + group.budget
        rows = (pages_BP, *(np.array([number], np.int32) for number in numbers))
        self._pool = prefill(self._plan, self.params, self._pool, tokens_BT, rows)
        group.num_read += num_tokens

    def _draw(self, num_steps: int) -> Drawn:
        """Runs the program; what it drew, on the host."""
        rows = self._state, num_steps, self.settings.most_ended(bool(self._waiting))
        self._pool, drawn = decode(self._plan, self.params, self._pool, *rows)
        return jax.device_get(drawn)

    def _take(self, drawn: Drawn) -> list[Update]:
        """Reads what was drawn, frees the slots of rows that ended, and tells their owners."""
        updates = []
        for slot, row in enumerate(self._rows):
            if row is None or self._state.finished_B[slot]:
                continue
            ids = [int(i) for i in drawn.ids_BN[slot] if i >= 0]
            state = self._state
            state.length_B[slot] += len(ids)
            state.count_B[slot] += len(ids)
            state.last_B[slot] = ids[-1]
            update = update_of(row, slot, state, ids, drawn)
            updates.append(update)
            if update.finish is not None:
                self._free(slot)
        return updates
