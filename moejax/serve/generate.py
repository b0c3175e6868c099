"""Cached generation: one compiled prefill, one compiled decoding loop, independent rows.

Prompts are padded on the left to a common length and run through the model in chunks of a fixed
size; then one `lax.while_loop` draws tokens until every row is finished. Both update a donated
cache in place, so shapes depend on the number of rows and slots only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.models.cache import KVCache, init_cache
from moejax.models.config import ModelConfig
from moejax.models.transformer import ForwardOptions, forward, split_layers, unembed
from moejax.serve.sampling import SamplingConfig, sample


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
    """An answer's ids without its stop id; finished: whether a stop id ended it."""

    ids: list[int]
    finished: bool


def generate(
    params: tree.Tree,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    settings: GenerateConfig = GenerateConfig(),
) -> list[Completion]:
    """Continues every prompt: x_t ~ p(x | prompt, x_<t) after `sampling`'s cuts.

    Prompts of similar length share a batch, and each answer is what the prompt alone would give
    (up to float rounding between batch shapes). The number of slots is rounded up to a `bucket`,
    so that few programs are ever compiled.

    With "dynamic" rope, whose frequencies depend on a text's length, a row's frequencies are fixed
    for the longest text it may become, its prompt plus max_new_tokens: the keys in its cache were
    turned by them. Up to `original_max_position` that changes nothing.

    Args:
      params: the model's tree, or what `prepare` makes of it (worth keeping for many calls).
      config: the model.
      prompts: token ids, none of them empty.
      settings: what to generate.

    Raises:
      InputError: an empty prompt, ids outside the vocabulary, a prompt that leaves no room in the
        model's context.
    """
    check_prompts(config, prompts)
    if not prompts:
        return []
    params = prepare(params, settings.options.compute_dtype)
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    num_groups = -(-len(prompts) // settings.batch_size)
    group_size = -(-len(prompts) // num_groups)
    completions: dict[int, Completion] = {}
    for first in range(0, len(prompts), group_size):
        rows = by_length[first : first + group_size]
        plan, state = _start(params, config, prompts, rows, group_size, settings)
        state = _decode(plan, params, state, settings.max_new_tokens)
        for row, completion in zip(rows, _completions(state, settings), strict=False):
            completions[row] = completion
    return [completions[row] for row in range(len(prompts))]


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
    params = prepare(params, settings.options.compute_dtype)
    # A conversation grows from call to call: doubling its slots keeps it in compiled programs.
    doubling = functools.partial(_power_of_two, least=512)
    plan, state = _start(params, config, [prompt], [0], 1, settings, doubling)
    sent, until = 0, min(every, settings.max_new_tokens)
    while True:
        state = _decode(plan, params, state, until)
        ids = _completions(state, settings)[0].ids
        if len(ids) > sent:
            yield ids[sent:]
        sent = len(ids)
        if until >= settings.max_new_tokens or bool(state.finished_B[0]):
            return
        until = min(until + every, settings.max_new_tokens)


def prepare(params: tree.Tree, compute_dtype: str = "float32") -> tree.Tree:
    """The tree as decoding reads it: one array per layer, in the dtype of the arithmetic.

    Slicing stacked weights or converting them would copy all of them for every token. Takes a
    second copy of the layers; does nothing to a tree that it made.
    """

    def cast(path, w):
        # Routers keep their own precision, as in `forward`.
        is_router = any(getattr(key, "key", None) == "router" for key in path)
        return jnp.asarray(w) if is_router else jnp.asarray(w, compute_dtype)

    if not any(isinstance(run, tuple) for run in params["layers"].values()):
        params = params | {"layers": _split(params["layers"])}
    return jax.tree_util.tree_map_with_path(cast, params)


def context_length(config: ModelConfig) -> int:
    """Most tokens, prompt and answer together, that the model is said to read."""
    if config.rope.kind == "dynamic":
        stretched = int(config.rope.factor * config.rope.original_max_position)
        return max(config.max_position, stretched)
    return config.max_position


def bucket(length: int) -> int:
    """Slots of a cache for `length` tokens: a multiple of 32, coarser from 256 on.

    At most a fifth is left over beyond 160, and lengths up to n make O(log n) shapes.
    """
    step = max(32, (1 << length.bit_length()) >> 3)
    return max(1, -(-length // step)) * step


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
    """Raises InputError, naming the first prompt that `generate` cannot continue."""
    context = context_length(config)
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {row} is empty: give at least one token")
        if len(prompt) >= context:
            raise InputError(
                f"prompt {row} has {len(prompt)} tokens and the model reads {context}, answer "
                "included: shorten the prompt"
            )
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= config.vocab_size:
            raise InputError(
                f"prompt {row} has token id {high if low >= 0 else low} and the model knows 0 to "
                f"{config.vocab_size - 1}: does the tokenizer belong to the model?"
            )


# -- inside ----------------------------------------------------------------------------------------

# Tokens of a prompt that one call of `_prefill` reads: enough to keep a CPU's cores busy with one
# row, few enough that short prompts waste little and that attention scores stay small.
_CHUNK = 32


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a compiled loop is specialised on, shapes aside."""

    config: ModelConfig
    options: ForwardOptions
    sampling: SamplingConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """A batch in the middle of its answers.

    last_B are each row's newest tokens, not yet in the cache; ids_BN all drawn so far, `count` of
    them a row; a row is finished at one of stop_ids or after its budget.
    """

    cache: KVCache
    last_B: jax.Array
    ids_BN: jax.Array
    count: jax.Array
    finished_B: jax.Array
    budget_B: jax.Array
    keys_B: jax.Array
    stop_ids: jax.Array


def _start(params, config, prompts, rows, num_rows, settings, to_slots=None):
    """Pads `rows` of the prompts to one batch of `num_rows` and fills a cache with them.

    to_slots: how many slots to take for how many tokens, `bucket` by default.
    """
    to_slots = to_slots or bucket
    # All but a prompt's last token, which the loop starts from.
    longest = max(len(prompts[row]) for row in rows) - 1
    num_tokens = -(-longest // _CHUNK) * _CHUNK
    tokens_BT = np.zeros((num_rows, num_tokens), np.int32)
    last_B, lengths_B, budget_B, row_ids_B = np.zeros((4, num_rows), np.int32)
    for i, row in enumerate(rows):
        before, last_B[i] = prompts[row][:-1], prompts[row][-1]
        tokens_BT[i, num_tokens - len(before) :] = before
        lengths_B[i] = len(before)
        budget_B[i] = min(settings.max_new_tokens, context_length(config) - len(prompts[row]))
        row_ids_B[i] = row
    num_slots = to_slots(num_tokens + int(budget_B.max()))
    cache = init_cache(
        config,
        jnp.asarray(num_tokens - lengths_B),
        num_slots,
        rope_length_B=jnp.asarray(lengths_B + 1 + budget_B),
        dtype=settings.options.compute_dtype,
        split=True,
    )
    for first in range(0, num_tokens, _CHUNK):
        chunk_BT = tokens_BT[:, first : first + _CHUNK]
        cache = _prefill(config, settings.options, params, cache, chunk_BT)
    key = jax.random.key(settings.seed)
    return _Plan(config, settings.options, settings.sampling), _State(
        cache=cache,
        last_B=jnp.asarray(last_B),
        ids_BN=jnp.zeros((num_rows, num_slots), jnp.int32),
        count=jnp.zeros((), jnp.int32),
        # Rows that only fill up the batch have nothing to say.
        finished_B=jnp.asarray(budget_B == 0),
        budget_B=jnp.asarray(budget_B),
        keys_B=jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids_B),
        stop_ids=jnp.array(settings.stop_ids, jnp.int32),
    )


@jax.jit
def _split(layers):
    return split_layers({"layers": layers})["layers"]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _prefill(config, options: ForwardOptions, params, cache: KVCache, tokens_BT) -> KVCache:
    """The cache with one more chunk of the prompts in it."""
    filled = forward(params, config, tokens_BT, cache=cache, options=options).cache
    assert filled is not None
    return filled


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(plan: _Plan, params, state: _State, until) -> _State:
    """Draws tokens until every row has `until` of them or is finished; the cache stays in place."""

    def unfinished(state):
        return (state.count < until) & ~jnp.all(state.finished_B)

    return jax.lax.while_loop(unfinished, lambda state: _step(plan, params, state), state)


def _step(plan: _Plan, params, state: _State) -> _State:
    """Reads every row's newest token and draws the one that follows it."""
    out = forward(
        params, plan.config, state.last_B[:, None], cache=state.cache, options=plan.options
    )
    assert out.cache is not None
    logits_BV = unembed(params, plan.config, out.hidden_BTD[:, 0])
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.count)
    drawn_B = sample(logits_BV, keys_B, plan.sampling)
    stopped_B = jnp.any(drawn_B[:, None] == state.stop_ids, axis=-1)
    count = state.count + 1
    return dataclasses.replace(
        state,
        cache=out.cache,
        last_B=drawn_B,
        ids_BN=jax.lax.dynamic_update_slice(state.ids_BN, drawn_B[:, None], (0, state.count)),
        count=count,
        finished_B=state.finished_B | stopped_B | (count >= state.budget_B),
    )


def _completions(state: _State, settings: GenerateConfig) -> list[Completion]:
    """Reads the answers drawn so far, cut at their stop ids and budgets."""
    ids_BN, budget_B = np.asarray(state.ids_BN), np.asarray(state.budget_B)
    completions = []
    for ids_N, budget in zip(ids_BN, budget_B, strict=True):
        drawn = ids_N[: min(int(state.count), budget)].tolist()
        stops = [at for at, token in enumerate(drawn) if token in settings.stop_ids]
        completions.append(Completion(drawn[: stops[0]] if stops else drawn, bool(stops)))
    return completions
