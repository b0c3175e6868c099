"""Generation with bridges: sources, bridges and target each keep what they have read.

A token costs one step of the target and, where a source reads along, of that source: nothing is
read again. With two tokenizers a source goes on as soon as a piece of text is settled
(`moejax.data.alignment`), so it may read nothing at one token and several at the next. One text at
a time; the states that are seen are those of teacher forcing on the same ids.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.data.alignment import align, settled_pieces
from moejax.data.grafting import Joined
from moejax.methods.graft import GraftConfig, Reading, keys_values
from moejax.methods.graft_forward import grafted, source_states
from moejax.models.cache import init_cache
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions, unembed
from moejax.serve.sampling import SamplingConfig, sample
from moejax.serve.text import TextStream

_CHUNK = 8  # source tokens read at a time, or one
_PARTS = (32, 16, 8, 4, 2, 1)  # target tokens read at a time


@dataclasses.dataclass(frozen=True)
class Lender:
    """A source and the bridge from it; params is a `prepare`d or stacked tree."""

    config: ModelConfig
    params: tree.Tree
    graft: GraftConfig
    bridge: tree.Tree
    joined: Joined


@dataclasses.dataclass(frozen=True)
class Grafted:
    """A target and, by name, those who lend it their states; options: how to compute."""

    target: ModelConfig
    target_params: tree.Tree
    lenders: Mapping[str, Lender]
    options: ForwardOptions = ForwardOptions()

    def chosen(self, names: Sequence[str] | None) -> dict[str, Lender]:
        """The lenders with these names, None: all of them; InputError for a name there is not."""
        wanted = list(self.lenders) if names is None else list(names)
        for name in wanted:
            if name not in self.lenders:
                known = ", ".join(self.lenders) or "none"
                raise InputError(f"source {name!r} is unknown: there is {known}")
        return {name: one for name, one in self.lenders.items() if name in wanted}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One token: its id, per source what it saw of it and what was read of it by then."""

    id: int
    limits: Mapping[str, int]
    num_source: Mapping[str, int]
    logits_V: jax.Array


class _Loan:
    """What one source has read of one text."""

    def __init__(self, lender: Lender, prompt: str, ids: Sequence[int], whole: bool):
        joined = lender.joined
        if joined.paper or lender.graft.placement == "paper":
            raise InputError(
                "a bridge in paper mode reads states of text that is not written yet: train one "
                "with another placement to generate"
            )
        self.lender, self.num_read = lender, 0
        self._stream = TextStream(joined.target.decode)
        self._tail = ""
        if whole or joined.prefix:
            found = align(
                prompt, joined.target, joined.source, joined.how,
                len(prompt) if joined.prefix else None,
            )
            # Ids that their own text does not give back see what there is of it from the start.
            limits = found.limits if whole else [len(found.source_ids)] * len(ids)
            self.limits = list(limits)
            self.source_ids = found.source_ids[: self.limits[-1]]
            # Text that the source has not read yet: the last piece, which nothing has settled.
            settled = joined.how == "settled" and not joined.prefix
            self._tail = settled_pieces(prompt)[-1] if settled else ""
            self._stream.push(ids)
            return
        bos = joined.source.bos_id
        self.source_ids = [bos] if bos is not None and joined.source.add_bos else []
        self.limits = []
        for token in ids:
            self._settled(token)
            self.limits.append(len(self.source_ids))

    def append(self, token: int) -> list[int]:
        """Takes a target token in; returns what the source reads because of it."""
        joined = self.lender.joined
        new = [] if joined.prefix else self._settled(token)
        self.limits.append(self.limits[-1] if joined.prefix else len(self.source_ids))
        return new

    def _settled(self, token: int) -> list[int]:
        """The source's tokens that this target token settles; they join `source_ids`."""
        joined = self.lender.joined
        if joined.how == "same":
            new = [token]
        else:
            self._tail += self._stream.push([token])
            pieces = settled_pieces(self._tail) if joined.how == "settled" else [self._tail, ""]
            new = [i for piece in pieces[:-1] if piece for i in joined.source.encode(piece)]
            self._tail = pieces[-1] if pieces else ""
        self.source_ids += new
        return new


class GraftedText:
    """One text being continued.

    Args:
      model: the target and its sources.
      prompt: text, or the target's ids.
      max_new_tokens: at most so many more tokens.
      sources: names of those who lend; the others are not read. None: all, (): the target alone.
      room: tokens that there is room for, prompt included; None: what prompt and answer take.

    Errors: InputError for a prompt that leaves no room, a source that is not there, and "paper"
    bridges, whose states of later text do not exist yet.
    """

    def __init__(
        self,
        model: Grafted,
        prompt: str | Sequence[int],
        max_new_tokens: int,
        sources: Sequence[str] | None = None,
        room: int | None = None,
    ):
        lenders = model.chosen(sources)
        self.model = model
        self.ids, text, whole = _read_prompt(model, prompt)
        left = min(room or model.target.max_position, model.target.max_position) - len(self.ids)
        if left < 1:
            raise InputError(
                f"the prompt has {len(self.ids)} tokens and the target reads "
                f"{len(self.ids) + left}: shorten it"
            )
        self.num_new = min(max_new_tokens, left)
        self.loans = {n: _Loan(one, text, self.ids, whole) for n, one in lenders.items()}
        num_target = room or len(self.ids) + self.num_new
        split = _is_split(model.target_params)
        self._target = init_cache(
            model.target, jnp.zeros(1, jnp.int32), num_target,
            dtype=model.options.compute_dtype, split=split,
        )
        self._kept: dict[str, Any] = {}
        for name, loan in self.loans.items():
            # With two tokenizers a target token may settle several of the source's.
            each = 1 if loan.lender.joined.how == "same" else 4
            most = each * (num_target if room else self.num_new) + _CHUNK
            slots = _round_up(most + (0 if room else len(loan.source_ids)), 64)
            slots = min(slots, _round_up(loan.lender.config.max_position, _CHUNK))
            self._kept[name] = _start(model, loan.lender, slots)
            self._read_source(name, loan.source_ids)
        self._logits = self._read_target(self.ids, {n: x.limits for n, x in self.loans.items()})

    @property
    def source_ids(self) -> list[int]:
        """What the only source has read and will read next."""
        (loan,) = self.loans.values()
        return loan.source_ids

    @property
    def limits(self) -> list[int]:
        """Per target token, how much of the only source it sees."""
        (loan,) = self.loans.values()
        return loan.limits

    def draw(
        self, sampling: SamplingConfig, key: jax.Array, ends: Sequence[int] | None = None
    ) -> Iterator[Drawn]:
        """Tokens, one after the other, until one of `ends` (None: the target's end tokens) or the
        budget."""
        ends = self._ends() if ends is None else ends
        for step in range(self.num_new):
            keys = jax.random.fold_in(key, step)[None]
            token = int(sample(self._logits[None], keys, sampling)[0])
            limits = {n: loan.limits[-1] for n, loan in self.loans.items()}
            num_read = {n: loan.num_read for n, loan in self.loans.items()}
            yield Drawn(token, limits, num_read, self._logits)
            if token in ends:
                return
            if step + 1 < self.num_new:
                self._append(token)

    def _ends(self) -> tuple[int, ...]:
        lenders = list(self.model.lenders.values())
        return lenders[0].joined.target.eos_ids if lenders else ()

    def _append(self, token: int) -> None:
        """All models read on by one target token."""
        self.ids.append(token)
        for name, loan in self.loans.items():
            self._read_source(name, loan.append(token))
        last = {n: loan.limits[-1:] for n, loan in self.loans.items()}
        self._logits = self._read_target([token], last)

    def _read_source(self, name: str, ids: Sequence[int]) -> None:
        loan, kept = self.loans[name], self._kept[name]
        room = kept["k"].shape[3] - _CHUNK
        if loan.num_read + len(ids) > room:
            raise InputError(
                f"source {name!r} has read {loan.num_read} tokens and has room for {room}: shorten "
                "the text"
            )
        lender = loan.lender
        static = (lender.config, lender.graft, self.model.options)
        for at in range(0, len(ids), _CHUNK):
            part = list(ids[at : at + _CHUNK])
            size = 1 if len(part) == 1 else _CHUNK  # one token is not padded: it is the usual case
            padded = jnp.asarray([part + [0] * (size - len(part))])
            params = (lender.params, lender.bridge)
            kept = _extend_source(static, params, kept, padded, loan.num_read)
            loan.num_read += len(part)
        self._kept[name] = kept

    def _read_target(self, ids: Sequence[int], limits: Mapping[str, Sequence[int]]) -> jax.Array:
        model = self.model
        grafts = tuple((name, loan.lender.graft) for name, loan in self.loans.items())
        static = (model.target, grafts, model.options)
        bridges = {name: loan.lender.bridge for name, loan in self.loans.items()}
        pairs = {name: (kept["k"], kept["v"]) for name, kept in self._kept.items()}
        logits, at = None, 0
        while at < len(ids):
            size = next(n for n in _PARTS if n <= len(ids) - at)
            part = slice(at, at + size)
            seen = {name: jnp.asarray([rows[part]]) for name, rows in limits.items()}
            tokens = jnp.asarray([ids[part]])
            logits, self._target = _extend_target(
                static, (model.target_params, bridges), self._target, pairs, (tokens, seen)
            )
            at += size
        assert logits is not None
        return logits


def _read_prompt(model: Grafted, prompt: str | Sequence[int]) -> tuple[list[int], str, bool]:
    """(ids, their text, whether the text gives the ids back)."""
    lenders = list(model.lenders.values())
    if not isinstance(prompt, str):
        ids = list(prompt)
        if not lenders:
            return ids, "", False
        tokenizer = lenders[0].joined.target
        text = tokenizer.decode(ids)
        return ids, text, bool(text) and tokenizer.encode(text, add_special=True) == ids
    if not lenders:
        raise InputError("a target without sources has no tokenizer here: give ids")
    return lenders[0].joined.target.encode(prompt, add_special=True), prompt, True


def generate_text(
    model: Grafted,
    prompt: str,
    max_new_tokens: int = 128,
    sampling: SamplingConfig = SamplingConfig(),
    seed: int = 0,
    sources: Sequence[str] | None = None,
) -> str:
    """The answer to one prompt, without its end token."""
    text = GraftedText(model, prompt, max_new_tokens, sources)
    ids = [drawn.id for drawn in text.draw(sampling, jax.random.key(seed))]
    tokenizer = next(iter(model.lenders.values())).joined.target
    return tokenizer.decode([i for i in ids if i not in tokenizer.eos_ids])


def _is_split(params: tree.Tree) -> bool:
    return any(isinstance(run, tuple) for run in params["layers"].values())


def _start(model: Grafted, lender: Lender, slots: int) -> dict[str, Any]:
    """An empty cache of the source, and room for the bridge's keys and values of its tokens."""
    graft, dtype = lender.graft, model.options.compute_dtype
    # A chunk is written whole, padding included.
    shape = (graft.num_layers(model.target), 1, graft.num_heads, slots + _CHUNK)
    size = graft.target_size // graft.num_heads
    cache = init_cache(
        lender.config, jnp.zeros(1, jnp.int32), slots + _CHUNK,
        dtype=dtype, split=_is_split(lender.params),
    )
    # Arrays of their own, since each is donated.
    return {
        "cache": cache,
        "k": jnp.zeros((*shape, size), dtype),
        "v": jnp.zeros((*shape, size), dtype),
    }


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend_source(static, params, kept, tokens_1S, num_read):
    """The source reads a chunk, padded on the right; its cache goes back to the real end.

    Slots after the real tokens are written again by the next chunk before anything sees them.
    """
    source, graft, options = static
    source_params, bridge = params
    cache = dataclasses.replace(kept["cache"], length=jnp.asarray(num_read, jnp.int32))
    states, output = source_states(
        source_params, source, graft.taps, tokens_1S, cache=cache, options=options
    )
    new = keys_values(bridge, states.astype(options.compute_dtype))
    at = (0, 0, 0, num_read, 0)
    k, v = (
        jax.lax.dynamic_update_slice(kept[name], part.astype(kept[name].dtype), at)
        for name, part in zip(("k", "v"), new, strict=True)
    )
    return {"cache": output.cache, "k": k, "v": v}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend_target(static, params, cache, pairs, read):
    """The target reads tokens: logits after the last one, and its cache."""
    target, grafts, options = static
    target_params, bridges = params
    tokens_1T, limits = read
    readings = {
        name: Reading(bridges[name], graft, pairs[name], limits[name]) for name, graft in grafts
    }
    output = grafted(target_params, target, tokens_1T, readings, cache=cache, options=options)
    logits = unembed(target_params, target, output.hidden_BTD[0, -1])
    return logits, output.cache


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
