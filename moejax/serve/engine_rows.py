"""What an engine remembers of its requests, and what it tells the programs about each row."""

from __future__ import annotations

import dataclasses

import numpy as np

from moejax.serve.engine_programs import Drawn, Rows
from moejax.serve.request import Request, TokenLogprob, Update
from moejax.serve.sampling import SamplingConfig, SamplingRows
from moejax.serve.text import TextStream, add_text


@dataclasses.dataclass
class Group:
    """A request under way: its prompt's pages, and how many of its samples have a slot."""

    request_id: int
    request: Request
    budget: int
    pages: list[int] | None = None
    num_read: int = 0
    num_admitted: int = 0

    @property
    def num_kept(self) -> int:
        """Tokens of the prompt that are read at once; drawing starts from the last one."""
        return len(self.request.prompt) - 1

    @property
    def is_read(self) -> bool:
        return self.num_read == self.num_kept


@dataclasses.dataclass
class Row:
    """One sample in its slot. to_copy: the pages (from, to) to copy once its prompt is read."""

    group: Group
    sample: int
    pages: list[int]
    to_copy: tuple[int, int] | None
    text: TextStream | None
    started: bool = False


def empty_rows(num_slots: int, pages_per_row: int, max_stop_ids: int) -> Rows:
    """Slots with nobody in them; numpy arrays, which `fill_slot` and `clear_slot` write into."""

    def zeros(*more: int, dtype=np.int32):
        return np.zeros((num_slots, *more), dtype)

    return Rows(
        pages_BP=zeros(pages_per_row),
        length_B=zeros(),
        rope_length_B=zeros(),
        last_B=zeros(),
        count_B=zeros(),
        limit_B=zeros(),
        finished_B=np.ones(num_slots, bool),
        seed_B=zeros(),
        index_B=zeros(),
        stop_ids_BZ=zeros(max_stop_ids) - 1,
        wants_B=zeros(dtype=bool),
        sampling=SamplingRows.of([SamplingConfig()] * num_slots),
    )


def fill_slot(rows: Rows, slot: int, row: Row) -> None:
    """Writes a row's numbers into its slot; it stays finished until its prompt is read."""
    request, group = row.group.request, row.group
    rows.pages_BP[slot] = 0
    rows.pages_BP[slot, : len(row.pages)] = row.pages
    rows.length_B[slot] = group.num_kept
    rows.rope_length_B[slot] = len(request.prompt) + group.budget
    rows.last_B[slot] = request.prompt[-1]
    rows.count_B[slot] = 0
    rows.limit_B[slot] = group.budget
    rows.seed_B[slot] = request.seed
    rows.index_B[slot] = request.index + row.sample
    rows.stop_ids_BZ[slot] = -1
    rows.stop_ids_BZ[slot, : len(request.stop_ids)] = request.stop_ids
    rows.wants_B[slot] = request.num_logprobs is not None
    for name in ("temperature", "top_k", "top_p", "min_p"):
        getattr(rows.sampling, f"{name}_B")[slot] = getattr(request.sampling, name)


def clear_slot(rows: Rows, slot: int) -> None:
    """Nobody is there: nothing is drawn, and nothing of the last row makes a step longer."""
    rows.finished_B[slot] = True
    rows.wants_B[slot] = False
    rows.length_B[slot] = 0
    fill = SamplingConfig()
    for name in ("temperature", "top_k", "top_p", "min_p"):
        getattr(rows.sampling, f"{name}_B")[slot] = getattr(fill, name)


def update_of(row: Row, slot: int, rows: Rows, ids: list[int], drawn: Drawn) -> Update:
    """What a row's owner is told of the ids drawn; `rows` count them already."""
    request = row.group.request
    finish = "length" if rows.count_B[slot] >= rows.limit_B[slot] else None
    if ids[-1] in request.stop_ids:
        finish, ids = "stop", ids[:-1]
    text, ids, finish = add_text(row.text, ids, finish)
    logprobs: tuple[TokenLogprob, ...] = ()
    if request.num_logprobs is not None:
        logprobs = tuple(
            logprob_of(drawn, slot, step, request.num_logprobs) for step in range(len(ids))
        )
    return Update(row.group.request_id, row.sample, tuple(ids), text, logprobs, finish)


def logprob_of(drawn: Drawn, slot: int, step: int, num_top: int) -> TokenLogprob:
    """What one step reported of one slot."""
    ids_K = drawn.top_ids_BNK[slot, step, :num_top].tolist()
    log_probs_K = drawn.top_log_probs_BNK[slot, step, :num_top].tolist()
    top = tuple(zip(ids_K, log_probs_K, strict=True))
    return TokenLogprob(float(drawn.log_probs_BN[slot, step]), top)
