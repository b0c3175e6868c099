"""Laws of generation: cached == full forward, padded batch == single rows, a seed decides all."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.models import transformer
from moejax.models.cache import init_cache
from moejax.models.config import ModelConfig
from moejax.moe import CONVENTIONS
from moejax.moe.config import MoEConfig
from moejax.ops.rope import RopeConfig
from moejax.serve import engine_programs
from moejax.serve import generate as serve
from moejax.serve.engine import Engine
from moejax.serve.generate import GenerateConfig
from moejax.serve.request import EngineConfig, Request
from moejax.serve.sampling import SamplingConfig

TINY = ModelConfig(
    family="llama",
    vocab_size=101,
    num_layers=2,
    d_model=32,
    d_ff=48,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    max_position=256,
    rope=RopeConfig(theta=10000.0),
)
CONFIGS = {
    "plain": TINY,
    "one kv head, tied, linear rope": dataclasses.replace(
        TINY, num_kv_heads=1, tie_embeddings=True, rope=RopeConfig(kind="linear", factor=4.0)
    ),
    "biases, llama3 rope": dataclasses.replace(
        TINY,
        attention_bias=True,
        mlp_bias=True,
        rope=RopeConfig(kind="llama3", factor=8.0, original_max_position=32),
    ),
    "moe": dataclasses.replace(TINY, moe=MoEConfig(num_experts=4, top_k=3)),
    # A few tokens choose few of these, and only those are computed.
    "many experts": dataclasses.replace(
        TINY, moe=MoEConfig(num_experts=16, top_k=2, **CONVENTIONS["mixtral"])
    ),
}
DYNAMIC = dataclasses.replace(
    TINY, rope=RopeConfig(kind="dynamic", factor=2.0, original_max_position=16)
)
PROMPTS = [[5, 9, 17], [3], list(range(40, 70)), [7, 7, 7, 7, 7, 7], [1, 99, 2, 98]]


@functools.cache
def random_params(config: ModelConfig):
    """Normal weights everywhere, biases too, so that forgetting one shows."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.1, 0.3, leaf.shape), leaf.dtype),
        transformer.abstract_params(config),
    )


@functools.partial(jax.jit, static_argnums=0)
def full_logits(config, params, text_BT, lengths_B):
    # Positions stop at each row's end, so that dynamic rope sees the row's own length.
    positions_BT = jnp.minimum(jnp.arange(text_BT.shape[1]), lengths_B[:, None] - 1)
    return transformer.logits(params, config, text_BT, positions_BT=positions_BT)


def greedy_by_full_forward(params, config, prompts, num_new):
    """The definition: all of the text through the model for every token."""
    num_tokens = max(map(len, prompts)) + num_new
    text_BT = np.zeros((len(prompts), num_tokens), np.int32)
    lengths_B = np.array([len(prompt) + num_new for prompt in prompts])
    for text, prompt in zip(text_BT, prompts, strict=True):
        text[: len(prompt)] = prompt
    for step in range(num_new):
        # What follows a position is not seen by it, so one shape serves all lengths.
        likeliest_BT = np.asarray(full_logits(config, params, text_BT, lengths_B).argmax(-1))
        for row, prompt in enumerate(prompts):
            at = len(prompt) + step
            text_BT[row, at] = likeliest_BT[row, at - 1]
    rows = zip(text_BT, prompts, strict=True)
    return [text[len(prompt) : len(prompt) + num_new].tolist() for text, prompt in rows]


@pytest.mark.parametrize("name", [*CONFIGS, "dynamic"])
def test_cached_batch_equals_full_forward(name):
    """Five prompts of 1 to 30 tokens in one padded batch, each as the full forward continues it.

    With dynamic rope the full forward of prompt + max_new_tokens tokens has the frequencies that
    generation fixes, and the longer prompts are past original_max_position.
    """
    config = CONFIGS.get(name, DYNAMIC)
    params = random_params(config)
    completions = serve.generate(params, config, PROMPTS, GenerateConfig(max_new_tokens=12))
    assert [c.ids for c in completions] == greedy_by_full_forward(params, config, PROMPTS, 12)
    assert not any(c.finished for c in completions)
    assert len({tuple(c.ids) for c in completions}) > 2


@pytest.mark.parametrize("name", ["plain", "dynamic"])
def test_padded_batch_equals_single_rows(name):
    config = CONFIGS.get(name, DYNAMIC)
    params = random_params(config)
    sampling = SamplingConfig(1.0, top_k=40, top_p=0.9)
    settings = GenerateConfig(max_new_tokens=9, sampling=sampling, seed=3, stop_ids=(11, 40))
    together = serve.generate(params, config, PROMPTS, settings)
    apart = dataclasses.replace(settings, batch_size=1)
    assert serve.generate(params, config, PROMPTS, apart) == together


def test_cache_holds_what_a_full_forward_computes():
    """Not only the argmax: hidden states of prefill and decoding steps, within f32 tolerance."""
    config = CONFIGS["plain"]
    params = random_params(config)
    text = np.random.default_rng(0).integers(0, 101, (1, 20)).astype(np.int32)
    full = jax.jit(lambda p: transformer.forward(p, config, text))(params).hidden_BTD
    forward = jax.jit(lambda *args: transformer.forward(args[0], config, args[1], cache=args[2]))
    for is_split in (False, True):
        tree = serve.prepare(params) if is_split else params
        cache = init_cache(config, jnp.array([3]), 32, split=is_split)
        outs = []
        for start, stop in ((0, 13), (13, 14), (14, 19), (19, 20)):
            padded = text[:, start:stop]
            if start == 0:
                padded = np.pad(padded, ((0, 0), (3, 0)))
            out = forward(tree, padded, cache)
            cache = out.cache
            outs.append(out.hidden_BTD[:, -(stop - start) :])
        got = jnp.concatenate(outs, axis=1)
        assert jnp.abs(got - full).max() < 1e-5 * jnp.abs(full).max()


def test_seed_decides_the_answer():
    config, params = CONFIGS["plain"], random_params(CONFIGS["plain"])
    settings = GenerateConfig(max_new_tokens=10, sampling=SamplingConfig(1.5), seed=1)
    same_prompt = [[5, 6]] * 4
    first = serve.generate(params, config, same_prompt, settings)
    assert serve.generate(params, config, same_prompt, settings) == first
    assert len({tuple(c.ids) for c in first}) == 4, "rows must not share random numbers"
    other = serve.generate(params, config, same_prompt, dataclasses.replace(settings, seed=2))
    assert all(a.ids != b.ids for a, b in zip(first, other, strict=True))


def test_stop_ids_end_rows_one_by_one():
    config, params = CONFIGS["plain"], random_params(CONFIGS["plain"])
    free = serve.generate(params, config, PROMPTS, GenerateConfig(max_new_tokens=12))
    stop_ids = (free[0].ids[4], free[2].ids[0])
    stopped = serve.generate(
        params, config, PROMPTS, GenerateConfig(max_new_tokens=12, stop_ids=stop_ids)
    )
    for before, after in zip(free, stopped, strict=True):
        ends = [at for at, token in enumerate(before.ids) if token in stop_ids]
        assert after.finished == bool(ends)
        assert after.ids == (before.ids[: ends[0]] if ends else before.ids)
    assert stopped[2].ids == []


def test_decoding_ends_when_all_rows_have():
    config, params = CONFIGS["plain"], serve.prepare(random_params(CONFIGS["plain"]))
    free = serve.generate(params, config, PROMPTS, GenerateConfig(max_new_tokens=8))
    settings = GenerateConfig(max_new_tokens=200, stop_ids=tuple({c.ids[2] for c in free}))
    told = []
    stopped = serve.generate(
        params, config, PROMPTS, settings, progress=lambda *numbers: told.append(numbers)
    )
    assert all(len(c.ids) <= 2 and c.finished for c in stopped)
    assert told == [(5, 5, sum(len(c.ids) for c in stopped))], "one round is enough"


def test_the_context_bounds_each_row():
    config = dataclasses.replace(TINY, max_position=40)
    params = random_params(config)
    settings = GenerateConfig(max_new_tokens=100)
    short, long = serve.generate(params, config, [[1, 2], list(range(35))], settings)
    assert (len(short.ids), len(long.ids)) == (38, 5)
    assert [short.ids] == greedy_by_full_forward(params, config, [[1, 2]], 38)


@pytest.mark.parametrize("every", [1, 4])
def test_streamed_ids_are_the_generated_ones(every):
    config, params = CONFIGS["plain"], random_params(CONFIGS["plain"])
    settings = GenerateConfig(max_new_tokens=15, sampling=SamplingConfig(1.0), seed=4)
    whole = serve.generate(params, config, PROMPTS[:1], settings)[0]
    chunks = list(serve.stream(params, config, PROMPTS[0], settings, every=every))
    assert all(1 <= len(chunk) <= every for chunk in chunks)
    assert [token for chunk in chunks for token in chunk] == whole.ids
    stopping = dataclasses.replace(settings, stop_ids=(whole.ids[6],))
    at = whole.ids.index(whole.ids[6])
    chunks = list(serve.stream(params, config, PROMPTS[0], stopping, every=every))
    assert [token for chunk in chunks for token in chunk] == whole.ids[:at]


def test_few_programs_are_compiled():
    config, params = CONFIGS["plain"], serve.prepare(random_params(CONFIGS["plain"]))
    programs = (engine_programs.prefill, engine_programs.decode)
    before = [program._cache_size() for program in programs]
    for length in (1, 2, 3, 31, 32, 33):
        settings = GenerateConfig(1 + length % 7, seed=length, stop_ids=(length,))
        serve.generate(params, config, [[1] * length], settings)
    # Room for 32 tokens and for 64, and prompts of up to 16 or 32 tokens.
    assert all(p._cache_size() - n <= 3 for p, n in zip(programs, before, strict=True))
    for length in (3, 70, 130):
        next(serve.stream(params, config, [1] * length, GenerateConfig(100 - length // 2)))
    prefills, decodes = (p._cache_size() - n for p, n in zip(programs, before, strict=True))
    assert prefills <= 6 and decodes <= 3


def test_long_prompts_are_read_in_chunks():
    config, params = CONFIGS["plain"], random_params(CONFIGS["plain"])
    prompt = np.random.default_rng(2).integers(0, 101, 101).tolist()
    prompts = [prompt[:n] for n in (101, 97, 96, 33, 32, 1)]
    answers = serve.generate(params, config, prompts, GenerateConfig(max_new_tokens=3))
    assert [a.ids for a in answers] == greedy_by_full_forward(params, config, prompts, 3)


def test_decoding_copies_neither_cache_nor_weights():
    """No copy or transpose of such a size in the compiled loop: it costs more than the products."""
    config, params = CONFIGS["plain"], serve.prepare(random_params(CONFIGS["plain"]))
    engine = Engine(params, config, EngineConfig(num_slots=5, num_pages=77))
    engine.submit(Request((1, 2, 3), 20))
    old = engine._pool[0]["0"][0]
    arguments = (engine._plan, params, engine._pool, engine._state, 20, False)
    compiled = engine_programs.decode.lower(*arguments).compile()
    large = {old.size} | {w.size for w in jax.tree.leaves(params) if w.ndim > 1}
    moved = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", compiled.as_text())
    assert not large & {math.prod(map(int, shape.split(","))) for shape in moved}
    engine.step()
    assert old.is_deleted(), "the old cache must be donated"


def test_buckets_are_few_and_close():
    assert [serve.bucket(n) for n in (0, 1, 32, 33, 255, 256, 257, 513)] == [
        32, 32, 32, 64, 256, 256, 320, 640,
    ]  # fmt: skip
    for n in range(1, 3000):
        assert n <= serve.bucket(n) <= max(32, 1.25 * n + 31)
    assert len({serve.bucket(n) for n in range(1, 4097)}) < 30


def test_prepare_changes_nothing_but_the_layout():
    params = random_params(CONFIGS["moe"])
    prepared = serve.prepare(params)
    again = serve.prepare(prepared)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (prepared, again)), strict=True))
    layers = prepared["layers"]["0"]
    np.testing.assert_array_equal(layers[1]["attn"]["w_q"], params["layers"]["0"]["attn"]["w_q"][1])
    half = serve.prepare(params, "bfloat16")
    assert half["layers"]["0"][0]["attn"]["w_q"].dtype == jnp.bfloat16
    assert half["layers"]["0"][0]["moe"]["router"]["w_hidden"].dtype == jnp.float32


def test_bfloat16_decodes():
    config, params = CONFIGS["plain"], random_params(CONFIGS["plain"])
    options = transformer.ForwardOptions(compute_dtype="bfloat16")
    completion = serve.generate(
        params, config, PROMPTS, GenerateConfig(max_new_tokens=5, options=options)
    )[0]
    assert len(completion.ids) == 5


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 256], "prompt 0 has 256 tokens and the model reads 256"),
        ([[1], [2, 101]], "prompt 1 has token id 101 and the model knows 0 to 100"),
        ([[-1, 2]], "prompt 0 has token id -1 and the model knows 0 to 100"),
    ],
)
def test_bad_prompts_are_named(prompts, message):
    with pytest.raises(InputError, match=message) as error:
        serve.generate({}, TINY, prompts)
    assert "\n" not in str(error.value)


def test_no_prompts_no_answers():
    assert serve.generate({}, TINY, []) == []
    with pytest.raises(InputError, match="max_new_tokens must be 1 or more, got 0"):
        GenerateConfig(max_new_tokens=0)
