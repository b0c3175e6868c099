"""ShadowLLM behind the server: rows of one batch, each computing the heads and neurons it needs.

A row's prompt and its first step, which reads the prompt's last token, are dense; what layer 0
mixed there decides what the next steps compute (and anew every `refresh_every` tokens), or every
step decides for itself (`Sparse.in_step`). All rows of a step share lists of units, the union of
what they keep, and each has factors that leave out what it does not keep itself. A dense row, or
one before its first step, keeps everything: while it is in the batch every unit is read.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from moejax.methods import shadow_decode
from moejax.methods.shadow_audit import Audit, AuditConfig, compare
from moejax.methods.shadow_mask import Mask, Sizes
from moejax.methods.shadow_predictor import predict
from moejax.serve.engine import Engine
from moejax.serve.engine_programs import Drawn, decode, reread
from moejax.serve.engine_rows import Row
from moejax.serve.request import EngineConfig
from moejax.serve.sparse import Sparse, deciding
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
        super().__init__(model.params, model.config, settings, decode_text)
        self.audit, self.policy = audit or Audit(AuditConfig(share=0)), model.policy
        self._model = dataclasses.replace(model, params=None)
        keeps_logits = self.audit.config.share > 0
        sizes, num_slots = self.policy.sizes, settings.num_slots
        self._plan = dataclasses.replace(self._plan, sizes=sizes, keeps_logits=keeps_logits)
        self._seats: list[_Seat | None] = [None] * num_slots
        self._num_sparse = 0
        kind = _InStep if model.in_step else _BetweenSteps
        self._kept = kind(self._model, num_slots)

    def report(self) -> dict[str, Any]:
        """What is skipped, and what the audit has seen so far."""
        skips = {"sparsity": self.policy.sparsity, "refresh_every": self.policy.refresh_every}
        return {"shadow": skips | self.audit.report()}

    def warm(self) -> None:
        """Compiles what requests of the engine's own sparsity need, in whatever company."""
        super().warm()
        for lists in self._kept.of_nobody():
            self._run(1, lists)  # nothing is computed
        if self._plan.keeps_logits:
            self._reread(0, [0], 0)

    # -- inside ------------------------------------------------------------------------------------

    def _draw(self, num_steps: int) -> Drawn:
        seats = list(self._seated())
        for _, seat in seats:
            num_steps = min(num_steps, self._num_until_due(seat))
        drawn = self._run(num_steps, self._kept.lists())
        self._look(seats, drawn)
        return jax.device_get(dataclasses.replace(drawn, context_BE=None, logits_BNV=None))

    def _run(self, num_steps: int, lists: shadow_decode.AnyPlan) -> Drawn:
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
                self._kept.keep(slot, None)
            yield slot, seat

    def _new_seat(self, row: Row) -> _Seat:
        asked, share = row.group.request.sparsity, self.policy.sparsity
        share = share if asked is None else (asked, asked)
        if self.audit.dense or share is None or not any(share):
            return _Seat(row, None, False)
        audited = self.audit.wants(self._num_sparse)
        self._num_sparse += 1
        return _Seat(row, share, audited)

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
        scores = self._kept.scores(drawn.context_BE)
        for slot, seat in due:
            assert seat.sparsity is not None
            if self._kept.decide(slot, seat.sparsity, scores):
                continue
            number = seat.row.group.request_id
            _log.warning("request %d: NaN among its scores, it runs dense", number)
            seat.sparsity, seat.audited = None, False
            self._kept.keep(slot, None)

    def _free(self, slot: int) -> None:
        seat = self._seats[slot]
        if seat is not None:
            # The first token is drawn after the prompt, which both read densely.
            if seat.audited and len(seat.ids) > 1:
                self._compare(slot, seat)
            self._seats[slot] = None
            self._kept.leave(slot)
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


class _BetweenSteps:
    """What every slot's row computes, decided between steps from scores on the host."""

    def __init__(self, model: Sparse, num_slots: int):
        self._model, sizes = model, model.policy.sizes
        self._lengths = shadow_decode.lengths(sizes, model.policy.sparsity)
        shape = num_slots, sizes.num_layers - sizes.first
        self._has_B = Mask(*(np.zeros((*shape, n), bool) for n in (sizes.heads, sizes.blocks)))
        self._lists: shadow_decode.Plan | None = None  # made when they are needed next

    def lists(self) -> shadow_decode.AnyPlan:
        """For the next steps."""
        if self._lists is None:
            self._lists = shadow_decode.union(self._has_B, self._lengths)
        return self._lists

    def of_nobody(self) -> Iterator[shadow_decode.AnyPlan]:
        """Of all shapes that rows of the model's own sparsity may need; no row keeps anything."""
        sizes, num_slots = self._model.policy.sizes, len(self._has_B.heads)
        for pair in _needed(self._model, self._lengths):
            yield shadow_decode.empty_lists(pair, num_slots, sizes)

    def keep(self, slot: int, kept: Mask | None) -> None:
        """Sets what a slot's row computes: units [L - first, U], or everything."""
        for name in ("heads", "blocks"):
            getattr(self._has_B, name)[slot] = True if kept is None else getattr(kept, name)
        self._lists = None

    def leave(self, slot: int) -> None:
        """Nobody is there."""
        for has_BLU in (self._has_B.heads, self._has_B.blocks):
            has_BLU[slot] = False
        self._lists = None

    def scores(self, context_BE: jax.Array) -> Mask:
        """[B, L, units] of all slots, from what layer 0's heads mixed at their newest tokens."""
        model = self._model
        if model.policy.predicted:
            assert model.predictor is not None
            return jax.device_get(_predicted(model.policy.sizes, model.predictor, context_BE))
        static = jax.tree.map(np.asarray, model.static)
        return jax.tree.map(lambda x: np.broadcast_to(x, (len(context_BE), *x.shape)), static)

    def decide(self, slot: int, sparsity: tuple[float, float], scores: Any) -> bool:
        """Keeps the slot's best; False where its scores are not finite."""
        sizes, found = self._model.policy.sizes, []
        both = zip((scores.heads, scores.blocks), sizes.kept(sparsity), strict=True)
        for scores_BLU, count in both:
            scores_LU = scores_BLU[slot]
            if not np.isfinite(scores_LU).all():
                return False
            best = np.argsort(-scores_LU[sizes.first :], axis=-1, kind="stable")[:, :count]
            found.append(shadow_decode.kept_units(best, scores_LU.shape[-1]))
        self.keep(slot, Mask(*found))
        return True


class _InStep:
    """How much every slot's row computes, where each step decides what: as `_BetweenSteps`."""

    def __init__(self, model: Sparse, num_slots: int):
        self._model, sizes = model, model.policy.sizes
        self._lengths = shadow_decode.lengths(sizes, model.policy.sparsity)
        self._whole_2 = sizes.heads, sizes.blocks
        self._keep_B2 = np.zeros((num_slots, 2), np.int32)

    def lists(self) -> shadow_decode.AnyPlan:
        return deciding(self._model, self._keep_B2.copy(), self._lengths)

    def of_nobody(self) -> Iterator[shadow_decode.AnyPlan]:
        nothing_B2 = np.zeros_like(self._keep_B2)
        for pair in _needed(self._model, self._lengths):
            yield deciding(self._model, nothing_B2, [pair])

    def keep(self, slot: int, kept: tuple[int, int] | None) -> None:
        """Sets how many heads and blocks a slot's row computes; None: everything."""
        self._keep_B2[slot] = self._whole_2 if kept is None else kept

    def leave(self, slot: int) -> None:
        self._keep_B2[slot] = 0

    def scores(self, context_BE: jax.Array) -> np.ndarray:
        """What they will be made from."""
        return np.asarray(context_BE)

    def decide(self, slot: int, sparsity: tuple[float, float], context_BE: Any) -> bool:
        self.keep(slot, self._model.policy.sizes.kept(sparsity))
        return bool(np.isfinite(context_BE[slot]).all())


def _needed(model: Sparse, lengths: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The lengths that hold what one row of the model's own sparsity keeps."""
    heads, blocks = model.policy.sizes.kept(model.policy.sparsity or (0.0, 0.0))
    return [pair for pair in lengths if pair[0] >= heads and pair[1] >= blocks]


@functools.partial(jax.jit, static_argnums=0)
def _predicted(sizes: Sizes, predictor: dict[str, Any], context_BE: jax.Array) -> Mask:
    return predict(predictor, context_BE, sizes)
