"""ShadowLLM behind the server: rows of one batch, each computing the heads and neurons it needs.

A row's prompt and its first step, which reads the prompt's last token, are dense; what layer 0
mixed there decides what the next steps compute (and anew every `refresh_every` tokens). All rows of
a step share lists of units, the union of what they keep, and each has factors that leave out what
it does not keep itself. A dense row, or one before its first step, keeps everything: while it is in
the batch every unit is read.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from moejax.core.errors import InputError
from moejax.methods import shadow_decode
from moejax.methods.shadow_audit import Audit, AuditConfig, compare
from moejax.methods.shadow_mask import Mask, Sizes, num_kept
from moejax.methods.shadow_predictor import predict
from moejax.serve.engine import Engine
from moejax.serve.engine_programs import Drawn, decode, reread
from moejax.serve.engine_rows import Row
from moejax.serve.request import EngineConfig
from moejax.serve.sparse import Sparse
from moejax.serve.text import Decode

# An audit looks at the first tokens of an answer: logits of all would not fit beside long ones.
AUDITED_TOKENS = 256
_NEVER = 2**30
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Seat:
    """What a slot's row computes. sparsity: of heads and blocks; None: nothing is skipped."""

    row: Row
    sparsity: tuple[float, float] | None
    audited: bool
    ids: list[int] = dataclasses.field(default_factory=list)
    logits_TV: list[np.ndarray] = dataclasses.field(default_factory=list)


class ShadowEngine(Engine):
    """`Engine` of a model laid out by `moejax.serve.sparse.ready`; a request may say its sparsity.

    Answers are those of the row alone; while it shares steps with others its sums are taken in
    another order, so that their last bits may differ. A dense row's never do, but of experts.

    Args:
      model: the policy's sparsity is that of requests which say none.
      audit: which sparse answers are compared with the dense model, and when to stop being sparse.
    """

    def __init__(
        self,
        model: Sparse,
        settings: EngineConfig = EngineConfig(),
        decode_text: Decode | None = None,
        audit: Audit | None = None,
    ):
        if model.asked is not None or model.at_token:
            raise InputError("a predictor that decides at every token is for sparse.generate")
        super().__init__(model.params, model.config, settings, decode_text)
        self.audit, self.policy = audit or Audit(AuditConfig(share=0)), model.policy
        self._predictor, self._static = model.predictor, model.static
        keeps_logits = self.audit.config.share > 0
        sizes, num_slots = self.policy.sizes, settings.num_slots
        self._plan = dataclasses.replace(self._plan, sizes=sizes, keeps_logits=keeps_logits)
        self._seats: list[_Seat | None] = [None] * num_slots
        self._num_sparse = 0
        self._lengths = shadow_decode.lengths(sizes, self.policy.sparsity)
        shape = num_slots, sizes.num_layers - sizes.first
        self._has_B = Mask(*(np.zeros((*shape, n), bool) for n in (sizes.heads, sizes.blocks)))
        self._lists: shadow_decode.Plan | None = None  # made when they are needed next

    def report(self) -> dict[str, Any]:
        """What is skipped, and what the audit has seen so far."""
        skips = {"sparsity": self.policy.sparsity, "refresh_every": self.policy.refresh_every}
        return {"shadow": skips | self.audit.report()}

    def warm(self) -> None:
        """Compiles what requests of the engine's own sparsity need, in whatever company."""
        super().warm()
        sizes, own = self.policy.sizes, self.policy.sparsity or (0.0, 0.0)
        kept = [num_kept(n, s) for n, s in zip((sizes.heads, sizes.blocks), own, strict=True)]
        for pair in self._lengths:
            if pair[0] >= kept[0] and pair[1] >= kept[1]:
                lists = shadow_decode.empty_lists(pair, self.settings.num_slots, sizes)
                self._run(1, lists)  # nobody is there: nothing is computed
        if self._plan.keeps_logits:
            self._reread(0, [0], 0)

    # -- inside ------------------------------------------------------------------------------------

    def _draw(self, num_steps: int) -> Drawn:
        seats = list(self._seated())
        for _, seat in seats:
            num_steps = min(num_steps, self._num_until_due(seat))
        if self._lists is None:
            self._lists = shadow_decode.union(self._has_B, self._lengths)
        drawn = self._run(num_steps, self._lists)
        self._look(seats, drawn)
        return jax.device_get(dataclasses.replace(drawn, context_BE=None, logits_BNV=None))

    def _run(self, num_steps: int, lists: shadow_decode.Plan) -> Drawn:
        rows = self._state, num_steps, self.settings.most_ended(bool(self._waiting))
        self._pool, drawn = decode(self._plan, self.params, self._pool, *rows, lists)
        return drawn

    def _seated(self) -> Iterator[tuple[int, _Seat]]:
        """Slots whose rows draw now; new ones keep everything until they are decided."""
        for slot, row in enumerate(self._rows):
            if row is None or self._state.finished_B[slot]:
                continue
            seat = self._seats[slot]
            if seat is None:
                seat = self._seats[slot] = self._new_seat(row)
                self._keep(slot, None)
            yield slot, seat

    def _new_seat(self, row: Row) -> _Seat:
        asked, share = row.group.request.sparsity, self.policy.sparsity
        share = share if asked is None else (asked, asked)
        if self.audit.dense or share is None or not any(share):
            return _Seat(row, None, False)
        audited = self.audit.wants(self._num_sparse)
        self._num_sparse += 1
        return _Seat(row, share, audited)

    def _keep(self, slot: int, kept: Mask | None) -> None:
        """Sets what a slot's row computes: units [L - first, U], or everything."""
        for name in ("heads", "blocks"):
            getattr(self._has_B, name)[slot] = True if kept is None else getattr(kept, name)
        self._lists = None

    def _num_until_due(self, seat: _Seat) -> int:
        """Tokens until what a row computes is decided (anew)."""
        every = self.policy.refresh_every
        if seat.sparsity is None or (seat.ids and not every):
            return _NEVER
        return every - (len(seat.ids) - 1) % every if seat.ids else 1

    def _look(self, seats: list[tuple[int, _Seat]], drawn: Drawn) -> None:
        """Notes what was drawn, and decides for the rows whose turn it is."""
        ids_BN, due = np.asarray(drawn.ids_BN), []
        for slot, seat in seats:
            if not seat.ids or self._num_until_due(seat) == (ids_BN[slot] >= 0).sum():
                due.append((slot, seat))
            ids = [i for i in ids_BN[slot].tolist() if i >= 0]
            if seat.audited and len(seat.ids) < AUDITED_TOKENS:
                seat.logits_TV.append(np.array(drawn.logits_BNV[slot])[: len(ids)])
            seat.ids += ids
        due = [(slot, seat) for slot, seat in due if seat.sparsity is not None]
        if not due:
            return
        scores = self._scores(drawn.context_BE)
        for slot, seat in due:
            self._decide(slot, seat, jax.tree.map(lambda x, at=slot: x[at], scores))

    def _scores(self, context_BE: jax.Array) -> Mask:
        """[B, L, units] of all slots."""
        if self.policy.predicted:
            assert self._predictor is not None
            scores = _predicted(self.policy.sizes, self._predictor, context_BE)
            return jax.device_get(scores)
        static = jax.tree.map(np.asarray, self._static)
        return jax.tree.map(lambda x: np.broadcast_to(x, (len(self._rows), *x.shape)), static)

    def _decide(self, slot: int, seat: _Seat, scores: Mask) -> None:
        assert seat.sparsity is not None
        found, first = [], self.policy.sizes.first
        for scores_LU, share in zip((scores.heads, scores.blocks), seat.sparsity, strict=True):
            if not np.isfinite(scores_LU).all():
                number = seat.row.group.request_id
                _log.warning("request %d: NaN among its scores, it runs dense", number)
                seat.sparsity, seat.audited = None, False
                self._keep(slot, None)
                return
            best = np.argsort(-scores_LU[first:], axis=-1, kind="stable")
            best = best[:, : num_kept(scores_LU.shape[-1], share)]
            found.append(shadow_decode.kept_units(best, scores_LU.shape[-1]))
        self._keep(slot, Mask(*found))

    def _free(self, slot: int) -> None:
        seat = self._seats[slot]
        if seat is not None:
            # The first token is drawn after the prompt, which both read densely.
            if seat.audited and len(seat.ids) > 1:
                self._compare(slot, seat)
            self._seats[slot], self._lists = None, None
            for has_BLU in (self._has_B.heads, self._has_B.blocks):
                has_BLU[slot] = False
        super()._free(slot)

    def _compare(self, slot: int, seat: _Seat) -> None:
        """Reads an answer again with the dense model, over its own keys and values in the cache."""
        sparse_TV = np.concatenate(seat.logits_TV)
        prompt = seat.row.group.request.prompt
        tokens = [prompt[-1], *seat.ids][: len(sparse_TV)]
        dense_TV = self._reread(slot, tokens, len(prompt) - 1)
        was_dense = self.audit.dense
        self.audit.add(compare(dense_TV[1:], sparse_TV[1:]))
        if self.audit.dense and not was_dense:
            _log.warning("ShadowLLM: %s", self.audit)

    def _reread(self, slot: int, tokens: list[int], first: int) -> np.ndarray:
        """Logits [T, V] of the dense model at tokens that lie in the row from place `first` on."""
        found = []
        for at in range(0, len(tokens), self._chunk):
            part = tokens[at : at + self._chunk]
            tokens_1T = np.zeros((1, self._chunk), np.int32)
            tokens_1T[0, : len(part)] = part
            numbers = first + at, len(part), int(self._state.rope_length_B[slot])
            rows = (
                self._state.pages_BP[slot : slot + 1],
                *(np.array([number], np.int32) for number in numbers),
            )
            self._pool, logits_1TV = reread(self._plan, self.params, self._pool, tokens_1T, rows)
            found.append(np.asarray(logits_1TV)[0, : len(part)])
        return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _predicted(sizes: Sizes, predictor: dict[str, Any], context_BE: jax.Array) -> Mask:
    return predict(predictor, context_BE, sizes)
