"""Generation that skips heads and neurons: dense over the prompt, then by lists of what is kept.

What layer 0's attention mixed at the last token read decides what the next tokens compute; with
`refresh_every` it decides anew after every so many tokens. A predictor that learned from tokens is
asked at every token instead, after layer 0's attention, and with DejaVu's every layer decides at
every token. Keys and values of skipped heads are kept all the same, so heads may come and go.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods import shadow_dejavu
from moejax.methods.shadow_decode import (
    AnyPlan,
    Asking,
    Plan,
    Scored,
    check_plan,
    kept_by_scores,
    lay_out,
    plan_of,
    with_plan,
)
from moejax.methods.shadow_mask import Kept, Mask, Sizes
from moejax.methods.shadow_order import reordered
from moejax.methods.shadow_predictor import IN_STEP, PER_LAYER, Predictor, predict
from moejax.models.cache import KVCache, init_cache
from moejax.models.config import ModelConfig
from moejax.models.options import ForwardOptions
from moejax.models.transformer import forward, unembed
from moejax.serve.engine_programs import seeing
from moejax.serve.prepare import bucket, check_prompts, context_length
from moejax.serve.sampling import SamplingConfig, sample

CHUNK = 16  # most tokens drawn between two looks at the stop ids


@dataclasses.dataclass(frozen=True)
class Policy:
    """What decides, and how much is skipped.

    Attributes:
      sizes: units per layer. sparsity: shares of heads and of blocks that are not computed; None:
        nothing is skipped and params may be of any split tree.
      refresh_every: tokens after which the lists are made anew; 0: never.
      predicted: whether scores come from the predictor, else the static ones serve all inputs.
    """

    sizes: Sizes
    sparsity: tuple[float, float] | None
    refresh_every: int = 0
    predicted: bool = True

    def __post_init__(self):
        if self.refresh_every < 0:
            raise InputError(f"refresh_every must be 0 (never) or more, got {self.refresh_every}")


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A model ready to generate: laid out params, what decides, and static scores.

    predictor: the weights of the one that reads layer 0; at_token: whether it is asked at every
      token for that token. asked: what every layer asks instead, the weights of
      `moejax.methods.shadow_decode.Asking`.
    """

    config: ModelConfig
    params: tree.Tree
    policy: Policy
    predictor: dict[str, Any] | None = None
    static: Mask | None = None
    options: ForwardOptions = ForwardOptions()
    asked: tuple[dict[str, Any], ...] | None = None
    at_token: bool = False

    @property
    def in_step(self) -> bool:
        """Whether every step decides for itself."""
        return self.policy.predicted and (self.at_token or self.asked is not None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Rows in the middle of their answers: the cache, the last logits, and what decides."""

    cache: KVCache
    logits_BV: jax.Array
    context_BE: jax.Array


@dataclasses.dataclass(frozen=True)
class Answer:
    """ids without the stop id; logits_TV: of every id drawn, where they were asked for."""

    ids: list[int]
    finished: bool
    logits_TV: np.ndarray | None = None


def ready(params: tree.Tree, config: ModelConfig, predictor: Predictor, policy: Policy) -> Sparse:
    """The model with its neurons in the predictor's order, laid out; policy.sizes: the predictor's.

    InputError for a model whose decoding cannot skip anything, and for a predictor that decides at
    every token with a policy that says when.
    """
    check_plan(config, policy.sizes)
    check_interval(predictor, policy.refresh_every)
    asked, at_token = asked_of(predictor), predictor.info.variant == "token"
    laid_out = lay_out(reordered(params, config, predictor.order_LF), config, policy.sizes)
    unified = jax.device_put(predictor.params) if asked is None else None
    static = predictor.static
    return Sparse(config, laid_out, policy, unified, static, asked=asked, at_token=at_token)


def check_interval(predictor: Predictor, refresh_every: int) -> None:
    """InputError for an interval beside a predictor that decides at every token."""
    if refresh_every and predictor.info.variant in IN_STEP:
        raise InputError(
            f"predictors of variant {predictor.info.variant!r} decide at every token: leave out "
            "refresh_every"
        )


def asked_of(predictor: Predictor) -> tuple[dict[str, Any], ...] | None:
    """`Sparse.asked` of DejaVu's predictors, None of others."""
    if predictor.info.variant != PER_LAYER:
        return None
    return shadow_dejavu.in_layers(predictor.params, predictor.order_LF, predictor.info.sizes)


def start(model: Sparse, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> State:
    """Reads the prompts, padded on the left, with every head and neuron."""
    length = bucket(max(map(len, prompts)))
    tokens_BT = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, length - len(prompt) :] = prompt
    start_B = jnp.asarray([length - len(prompt) for prompt in prompts], jnp.int32)
    # Whole chunks are drawn; what is past the budget is thrown away.
    num_slots = bucket(length + max_new_tokens + CHUNK)
    return _prefill(model.config, model.options, num_slots, model.params, tokens_BT, start_B)


def decide(model: Sparse, context_BE: jax.Array) -> AnyPlan | None:
    """What the next tokens compute; None: everything."""
    if model.policy.sparsity is None:
        return None
    sizes, shares = model.policy.sizes, model.policy.sparsity
    if not model.policy.predicted:
        assert model.static is not None
        kept = kept_by_scores(jax.tree.map(jnp.asarray, model.static), sizes, shares)
        return Plan(kept)
    if model.in_step:
        keep_B2 = np.tile(np.array(sizes.kept(shares), np.int32), (len(context_BE), 1))
        plan = deciding(model, keep_B2)
        return dataclasses.replace(plan, keep_B2=None) if len(keep_B2) == 1 else plan
    return plan_of(_predicted(sizes, shares, model.predictor, context_BE), sizes)


def deciding(
    model: Sparse, keep_B2: np.ndarray, allowed: Sequence[tuple[int, int]] | None = None
) -> Scored | Asking:
    """What a model whose predictor decides inside each step computes of rows that keep so much.

    keep_B2: int32 [B, 2], heads and blocks of a layer. allowed: lengths of lists as
    `moejax.methods.shadow_decode.lengths` gives them, the first with room is taken; None: any.
    """
    sizes = model.policy.sizes
    most = np.minimum(keep_B2.sum(axis=0), (sizes.heads, sizes.blocks)).tolist()
    heads, blocks = next(
        pair for pair in allowed or [tuple(most)] if pair[0] >= most[0] and pair[1] >= most[1]
    )
    if model.asked is not None:
        return Asking(model.asked, keep_B2, (heads, blocks))
    assert model.predictor is not None
    return Scored(model.predictor, keep_B2, sizes, (heads, blocks))


def advance(
    model: Sparse,
    state: State,
    plan: AnyPlan | None,
    keys: jax.Array,
    sampling: SamplingConfig = SamplingConfig(temperature=0),
) -> tuple[State, jax.Array, jax.Array]:
    """Draws len(keys) tokens per row under one plan: the new state, ids [B, T], logits [B, T, V].

    keys: [T, B] random keys. The last id drawn has been read too. The given state is used up.
    """
    static = (model.config, model.options, model.policy.sizes, sampling)
    return _advance(static, model.params, plan, state, keys)


def generate(
    model: Sparse,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    sampling: SamplingConfig = SamplingConfig(temperature=0),
    *,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    with_logits: bool = False,
) -> list[Answer]:
    """Continues the prompts together: row i's t-th token has the key fold_in(fold_in(seed, i), t).

    with_logits keeps the logits of every token, [T, V] per row.

    InputError: an empty prompt, an unknown id, no room in the model's context, a prompt that the
    model turns into NaN.
    """
    check_prompts(model.config, prompts)
    budget = min(max_new_tokens, context_length(model.config) - max(map(len, prompts)))
    state = start(model, prompts, budget)
    if not np.isfinite(np.asarray(state.context_BE)).all():
        raise InputError("NaN among what a mask is decided from: the model's weights are broken")
    plan = decide(model, state.context_BE)
    rows = [jax.random.fold_in(jax.random.key(seed), row) for row in range(len(prompts))]
    drawn_BT: list[list[int]] = [[] for _ in prompts]
    logits: list[np.ndarray] = []
    often, first, chunk = model.policy.refresh_every, 0, 0
    while (first := first + chunk) < budget:
        if first and often and first % often == 0:
            plan = decide(model, state.context_BE)
        chunk = min(CHUNK, often - first % often) if often else CHUNK
        keys = _keys(jnp.stack(rows), first, chunk)
        state, ids_BT, logits_BTV = advance(model, state, plan, keys, sampling)
        if with_logits:
            logits.append(np.asarray(logits_BTV))
        for drawn, ids in zip(drawn_BT, np.asarray(ids_BT).tolist(), strict=True):
            drawn += ids
        if all(set(drawn[:budget]) & set(stop_ids) for drawn in drawn_BT):
            break
    found = []
    for row, drawn in enumerate(drawn_BT):
        ends = [t for t, i in enumerate(drawn[:budget]) if i in stop_ids]
        ids = drawn[: ends[0] if ends else budget]
        kept = np.concatenate(logits, axis=1)[row, : len(ids)] if with_logits else None
        found.append(Answer(ids, bool(ends), kept))
    return found


def dense_logits(model: Sparse, prompt: Sequence[int], ids: Sequence[int]) -> np.ndarray:
    """What the dense model says at the places where `ids` were drawn: [len(ids), V]."""
    text = [*prompt, *ids]
    tokens_1T = np.zeros((1, bucket(len(text))), np.int32)  # what follows a token does not move it
    tokens_1T[0, : len(text)] = text
    found = _dense_logits(model.config, model.options, model.params, tokens_1T)
    return np.asarray(found[len(prompt) - 1 : len(text) - 1])


# -- inside ----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(config, options, num_slots: int, params, tokens_BT, start_B) -> State:
    dtype = options.compute_dtype
    cache = init_cache(config, start_B, num_slots, dtype=dtype, split=True)
    return _read(config, options, params, cache, tokens_BT)


def _read(config, options, params, cache: KVCache, tokens_BT) -> State:
    contexts: list[jax.Array] = []
    output = forward(
        params, config, tokens_BT, cache=cache, options=options, inserted=seeing(contexts)
    )
    last_BD = output.hidden_BTD[:, -1]
    context_BE = contexts[0][:, -1].reshape(last_BD.shape[0], -1)
    assert isinstance(output.cache, KVCache)
    return State(output.cache, unembed(params, config, last_BD), context_BE)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _advance(static, params, plan: AnyPlan | None, state: State, keys):
    config, options, sizes, sampling = static

    def step(state: State, keys_B):
        ids_B = sample(state.logits_BV, keys_B, sampling)
        tokens_B1 = ids_B[:, None]

        def read(used: tree.Tree) -> State:
            return _read(config, options, used, state.cache, tokens_B1)

        new = read(with_plan(params, config, sizes, plan, lambda: read(params).context_BE))
        return new, (ids_B, state.logits_BV)

    state, (ids_TB, logits_TBV) = jax.lax.scan(step, state, keys)
    return state, ids_TB.T, jnp.swapaxes(logits_TBV, 0, 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predicted(sizes: Sizes, sparsity, predictor, context_BE) -> Kept:
    return kept_by_scores(predict(predictor, context_BE, sizes), sizes, sparsity)


@functools.partial(jax.jit, static_argnums=2)
def _keys(keys_B: jax.Array, first: Any, num: int) -> jax.Array:
    """[T, B] keys of tokens first, first + 1, ..."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    return jax.vmap(lambda t: fold(keys_B, t))(first + jnp.arange(num))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _dense_logits(config, options, params, tokens_1T) -> jax.Array:
    hidden_TD = forward(params, config, tokens_1T, options=options).hidden_BTD[0]
    return unembed(params, config, hidden_TD)
