"""Generation with a bridge: source, bridge and target each keep what they have read.

A token costs one step of the target and, where the source reads along, of the source: nothing is
read again. With two tokenizers the source goes on as soon as a piece of text is settled
(`moejax.data.alignment`), so it may read nothing at one token and several at the next. One text at
a time; the states that are seen are those of teacher forcing on the same ids.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

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

_CHUNK = 8  # source tokens read at a time


@dataclasses.dataclass(frozen=True)
class Grafted:
    """A source, a target and the bridge between them, ready to answer.

    params are `prepare`d or stacked trees; options: how to compute.
    """

    source: ModelConfig
    source_params: tree.Tree
    target: ModelConfig
    target_params: tree.Tree
    graft: GraftConfig
    bridge: tree.Tree
    joined: Joined
    options: ForwardOptions = ForwardOptions()


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One token: its id, what the whole text is so far, and how many source tokens it saw."""

    id: int
    limit: int
    num_source: int
    logits_V: jax.Array


class GraftedText:
    """One text being continued.

    Args:
      model: the pair.
      prompt: text. max_new_tokens: at most so many more tokens.

    Errors: InputError for a prompt that leaves no room, and for "paper" bridges, whose states of
    later text do not exist yet.
    """

    def __init__(self, model: Grafted, prompt: str, max_new_tokens: int):
        joined = model.joined
        if joined.paper or model.graft.placement == "paper":
            raise InputError(
                "a bridge in paper mode reads states of text that is not written yet: train one "
                "with another placement to generate"
            )
        self.model = model
        found = align(
            prompt, joined.target, joined.source, joined.how, len(prompt) if joined.prefix else None
        )
        self.ids, self.limits = list(found.target_ids), list(found.limits)
        room = model.target.max_position - len(self.ids)
        if room < 1:
            raise InputError(
                f"the prompt has {len(self.ids)} tokens and the target reads "
                f"{model.target.max_position}: shorten it"
            )
        self.num_new = min(max_new_tokens, room)
        self.source_ids = found.source_ids[: self.limits[-1]]
        # Text that the source has not read yet: the last piece, which nothing has settled.
        settled = joined.how == "settled" and not joined.prefix
        self._tail = settled_pieces(prompt)[-1] if settled else ""
        self._stream = TextStream(joined.target.decode)
        self._stream.push(self.ids)
        slots = _round_up(len(self.source_ids) + 4 * self.num_new + _CHUNK, 64)
        slots = min(slots, _round_up(model.source.max_position, _CHUNK))
        self._state = _start(model, len(self.ids) + self.num_new, slots)
        self._num_read = 0
        self._read_source(self.source_ids)
        self._logits = self._read_target(self.ids, self.limits)

    def draw(self, sampling: SamplingConfig, key: jax.Array) -> Iterator[Drawn]:
        """Tokens, one after the other, until the target's end token or the budget."""
        for step in range(self.num_new):
            logits = self._logits
            token = int(sample(logits[None], jax.random.fold_in(key, step)[None], sampling)[0])
            yield Drawn(token, self.limits[-1], len(self.source_ids), logits)
            if token in self.model.joined.target.eos_ids or step == self.num_new - 1:
                return
            self._append(token)

    def _append(self, token: int) -> None:
        """Both models read on by one target token."""
        self.ids.append(token)
        joined = self.model.joined
        if not joined.prefix:
            self._read_source(self._settled(token))
        self.limits.append(len(self.source_ids) if not joined.prefix else self.limits[-1])
        self._logits = self._read_target([token], self.limits[-1:])

    def _settled(self, token: int) -> list[int]:
        """The source's tokens that this target token settles; they join `source_ids`."""
        joined = self.model.joined
        if joined.how == "same":
            new = [token]
        else:
            self._tail += self._stream.push([token])
            pieces = settled_pieces(self._tail) if joined.how == "settled" else [self._tail, ""]
            new = [i for piece in pieces[:-1] if piece for i in joined.source.encode(piece)]
            self._tail = pieces[-1] if pieces else ""
        self.source_ids += new
        return new

    def _read_source(self, ids: Sequence[int]) -> None:
        room = self._state["k"].shape[3] - _CHUNK
        if self._num_read + len(ids) > room:
            raise InputError(
                f"the source has read {self._num_read} tokens and has room for {room}: shorten "
                "the text"
            )
        model = self.model
        for at in range(0, len(ids), _CHUNK):
            part = list(ids[at : at + _CHUNK])
            padded = jnp.asarray([part + [0] * (_CHUNK - len(part))])
            self._state = _extend_source(
                (model.source, model.graft, model.options),
                (model.source_params, model.bridge),
                self._state,
                padded,
                self._num_read,
            )
            self._num_read += len(part)

    def _read_target(self, ids: Sequence[int], limits: Sequence[int]) -> jax.Array:
        model = self.model
        static = (model.target, model.graft, model.options)
        params = (model.target_params, model.bridge)
        logits = None
        for at in range(0, len(ids), 32) if len(ids) > 1 else (0,):
            part = (jnp.asarray([ids[at : at + 32]]), jnp.asarray([limits[at : at + 32]]))
            logits, self._state = _extend_target(static, params, self._state, *part)
        assert logits is not None
        return logits


def generate_text(
    model: Grafted,
    prompt: str,
    max_new_tokens: int = 128,
    sampling: SamplingConfig = SamplingConfig(),
    seed: int = 0,
) -> str:
    """The answer to one prompt, without its end token."""
    text = GraftedText(model, prompt, max_new_tokens)
    ids = [drawn.id for drawn in text.draw(sampling, jax.random.key(seed))]
    ends = model.joined.target.eos_ids
    return model.joined.target.decode([i for i in ids if i not in ends])


def _start(model: Grafted, target_slots: int, source_slots: int):
    """Empty caches, and room for the bridge's keys and values of every source token."""
    graft, dtype = model.graft, model.options.compute_dtype

    def empty(config, params, slots):
        split = any(isinstance(run, tuple) for run in params["layers"].values())
        # Arrays of their own, since each is donated.
        return init_cache(config, jnp.zeros(1, jnp.int32), slots, dtype=dtype, split=split)

    # A chunk is written whole, padding included.
    shape = (graft.num_layers(model.target), 1, graft.num_heads, source_slots + _CHUNK)
    size = graft.target_size // graft.num_heads
    return {
        "source": empty(model.source, model.source_params, source_slots + _CHUNK),
        "target": empty(model.target, model.target_params, target_slots),
        "k": jnp.zeros((*shape, size), dtype),
        "v": jnp.zeros((*shape, size), dtype),
    }


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend_source(static, params, state, tokens_1S, num_read):
    """The source reads a chunk, padded on the right; its cache goes back to the real end.

    Slots after the real tokens are written again by the next chunk before anything sees them.
    """
    source, graft, options = static
    source_params, bridge = params
    cache = dataclasses.replace(state["source"], length=jnp.asarray(num_read, jnp.int32))
    states, output = source_states(
        source_params, source, graft.taps, tokens_1S, cache=cache, options=options
    )
    new = keys_values(bridge, states.astype(options.compute_dtype))
    at = (0, 0, 0, num_read, 0)
    k, v = (
        jax.lax.dynamic_update_slice(state[name], part.astype(state[name].dtype), at)
        for name, part in zip(("k", "v"), new, strict=True)
    )
    return state | {"source": output.cache, "k": k, "v": v}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend_target(static, params, state, tokens_1T, limits_1T):
    """The target reads tokens: logits after the last one, and the new state."""
    target, graft, options = static
    target_params, bridge = params
    reading = Reading(bridge, graft, (state["k"], state["v"]), limits_1T)
    output = grafted(
        target_params,
        target,
        tokens_1T,
        {"source": reading},
        cache=state["target"],
        options=options,
    )
    logits = unembed(target_params, target, output.hidden_BTD[0, -1])
    return logits, state | {"target": output.cache}


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
