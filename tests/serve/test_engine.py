"""Laws of the engine: a row is what it would be alone, whoever comes and goes beside it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.methods.esft_delta import extract, insert
from moejax.methods.expert_config import ExpertConfig
from moejax.serve import engine_programs
from moejax.serve.engine import Engine
from moejax.serve.likelihood import log_likelihoods
from moejax.serve.prepare import prepare
from moejax.serve.request import EngineConfig, Request
from moejax.serve.sampling import SamplingConfig
from tests.serve.test_generate import CONFIGS, TINY, random_params

# Small pages and chunks, so that prompts and answers cross their borders.
SETTINGS = EngineConfig(
    num_slots=3, max_length=96, page_size=8, prefill_chunk=8, num_steps=5, max_logprobs=2
)
HOT = SamplingConfig(1.3, top_k=50, top_p=0.95)
REQUESTS = [
    Request((5, 9, 17), 11, HOT, seed=1, num_logprobs=2),
    Request((3,), 20, seed=1, num_logprobs=0),
    Request(tuple(range(40, 70)), 6, SamplingConfig(0.7, min_p=0.05), seed=9, num_logprobs=2),
    Request((7,) * 9, 30, SamplingConfig(2.0), seed=-3, index=4, num_logprobs=1),
    Request((1, 99, 2, 98), 3, HOT, seed=1, num_logprobs=2, stop_ids=(11, 40)),
]


@functools.cache
def params_of(name: str):
    return prepare(random_params(CONFIGS[name]))


def engine_of(name: str = "plain", decode_text=None, **changes) -> Engine:
    settings = dataclasses.replace(SETTINGS, **changes)
    return Engine(params_of(name), CONFIGS[name], settings, decode_text)


def spell(ids) -> str:
    """A decoder of our own: token 7 is "h"."""
    return "".join(chr(97 + i % 26) for i in ids)


@pytest.mark.parametrize("name", ["plain", "moe", "many experts"])
def test_a_row_is_the_same_bits_whoever_shares_its_batch(name):
    """Alone, in company, and in another order: ids and log-probabilities equal to the last bit."""
    alone = [engine_of(name).run([request])[0] for request in REQUESTS]
    together = engine_of(name).run(REQUESTS)
    reversed_ = engine_of(name).run(REQUESTS[::-1])[::-1]
    assert together == alone and reversed_ == alone
    assert [len(a.ids) for (a,) in alone[:4]] == [11, 20, 6, 30]
    assert all(answer.logprobs for (answer,) in alone)


@pytest.mark.parametrize("name", ["moe", "many experts"])
def test_requests_of_several_adapters_are_answered_as_by_tuned_models(name):
    base, config = random_params(CONFIGS[name]), CONFIGS[name]
    other = jax.tree.map(lambda w: w[..., ::-1], base)
    picks = {"a": ExpertConfig({0: (1, 2), 1: (3,)}), "b": ExpertConfig({1: (1,)})}
    deltas = {key: extract(other, config, chosen) for key, chosen in picks.items()}
    params = jax.tree.map(np.asarray, base)
    engine = Engine(params, config, SETTINGS, deltas=deltas)
    names = ("a", None, "b", "a", "a")
    asked = [dataclasses.replace(r, adapter=a) for r, a in zip(REQUESTS, names, strict=True)]
    found = engine.run(asked)
    tuned = {key: insert(params, config, delta) for key, delta in deltas.items()} | {None: params}
    for request, adapter, answers in zip(REQUESTS, names, found, strict=True):
        alone = Engine(tuned[adapter], config, SETTINGS).run([request])[0]
        assert answers == alone
    assert len({tuple(engine.run([dataclasses.replace(asked[0], adapter=a)])[0][0].ids)
                for a in (None, "a", "b")}) > 1
    with engine.laid("b") as laid:
        jax.tree.map(np.testing.assert_array_equal, laid, prepare(tuned["b"]))
    assert engine.adapters == ["a", "b"]


def test_log_probabilities_are_those_of_the_text():
    (answer,) = engine_of().run([REQUESTS[2]])[0]
    pair = (REQUESTS[2].prompt, answer.ids)
    (expected,) = log_likelihoods(params_of("plain"), TINY, [pair], num_top=2)
    found = [p.log_prob for p in answer.logprobs]
    np.testing.assert_allclose(found, expected.token_log_probs, atol=3e-5)
    tops = [[i for i, _ in p.top] for p in answer.logprobs]
    assert tops == [list(ids) for ids in expected.top_ids]
    found_tops = [[p for _, p in one.top] for one in answer.logprobs]
    np.testing.assert_allclose(found_tops, expected.top_log_probs, atol=3e-5)


def test_samples_share_one_prefill(monkeypatch):
    """Sample j is what a request of its own with index j gives, and the prompt is read once."""
    request = Request(tuple(range(20)), 7, HOT, seed=5)
    apart = [engine_of().run([dataclasses.replace(request, index=j)])[0][0] for j in range(5)]
    chunks = []
    real = engine_programs.prefill
    monkeypatch.setattr("moejax.serve.engine.prefill", lambda *a: chunks.append(1) or real(*a))
    engine = engine_of()
    (answers,) = engine.run([dataclasses.replace(request, num_samples=5)])
    assert answers == apart
    assert len({tuple(a.ids) for a in answers}) == 5
    assert len(chunks) == 3  # 19 tokens in chunks of 8, for five samples in three slots
    assert engine.num_free_pages == 39


def test_slots_are_filled_again_as_rows_end():
    engine = engine_of()
    lengths = [7, 60, 7, 7, 7, 7, 7, 7]
    for n in lengths:
        engine.submit(Request((n,), n))
    updates, most_running = [], 0
    while engine.is_busy:
        updates += engine.step()
        most_running = max(most_running, engine.num_running)
    ended = [u.request_id for u in updates if u.finish]
    assert sorted(ended) == list(range(1, 9)) and ended[-1] == 2, "the long one ends last"
    assert most_running == 3 and engine.num_free_pages == 39


def test_few_pages_make_requests_wait():
    """Room for one row of 90 tokens: the answers are those of an engine with room for all."""
    requests = [Request((i, 2, 3), 60 + i, HOT, seed=i, num_samples=1 + i % 2) for i in range(4)]
    roomy, tight = engine_of(), engine_of(num_pages=12)
    assert tight.run(requests) == roomy.run(requests)
    assert tight.num_free_pages == 12
    with pytest.raises(InputError, match="may need 12 pages and the cache has 11"):
        engine_of(num_pages=11).submit(Request((1, 2), 94))


def test_stop_strings_end_rows_across_tokens():
    (free,) = engine_of(decode_text=spell).run([Request((3,), 30)])[0]
    assert free.text == spell(free.ids) and free.finish == "length"
    text = free.text
    stop = text[9:12]
    at = text.find(stop)
    (answer,) = engine_of(decode_text=spell).run([Request((3,), 30, stop=("#", stop))])[0]
    assert (answer.text, answer.finish) == (text[:at], "stop")
    assert answer.ids == free.ids[: at + 3]
    with pytest.raises(InputError, match="stop strings need an engine that decodes text"):
        engine_of().submit(Request((3,), 30, stop=("x",)))


def test_a_cancelled_request_frees_its_slots_and_pages():
    engine = engine_of()
    first = engine.submit(Request((3,) * 20, 60, num_samples=5))
    second = engine.submit(Request((4,), 5))
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (3, 3)
    with pytest.raises(InputError, match="busy with other requests"):
        engine.run([Request((4,), 5)])
    engine.cancel(first)
    engine.cancel(first)
    assert (engine.num_running, engine.num_waiting) == (0, 1)
    updates = []
    while engine.is_busy:
        updates += engine.step()
    assert {u.request_id for u in updates} == {second}
    assert engine.num_free_pages == 39
    assert not engine.is_busy and engine.step() == []


def test_other_parameters_compile_nothing():
    """A sweep over interpolated models goes through the programs of the first."""
    engine = engine_of()
    before_ids = engine.run(REQUESTS)
    sizes = [p._cache_size() for p in (engine_programs.decode, engine_programs.prefill)]
    engine.params = jax.tree.map(lambda w: w * 0.5, engine.params)
    assert engine.run(REQUESTS) != before_ids
    assert sizes == [p._cache_size() for p in (engine_programs.decode, engine_programs.prefill)]


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request((1,) * 96), "the prompt has 96 tokens and a row here has room for 96"),
        (Request((1,), num_logprobs=3), "3 log-probabilities .* reports at most 2"),
        (Request((1,), adapter="law"), "adapter 'law' is unknown: this engine has none"),
        (Request((1,), stop_ids=tuple(range(9))), "9 stop ids and this engine has room for 8"),
        (Request((101,)), "token id 101"),
    ],
)
def test_what_cannot_be_answered_is_refused(request_, message):
    engine = engine_of()
    with pytest.raises(InputError, match=message):
        engine.run([Request((1,)), request_])
    assert not engine.is_busy


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"num_samples": 0}, "num_samples must be 1 or more, got 0"),
        ({"seed": 2**31}, "seed must be a number of 32 bits"),
        ({"stop": ("a", "")}, "a stop string is empty"),
    ],
)
def test_requests_say_what_is_wrong(fields, message):
    with pytest.raises(InputError, match=message):
        Request((1,), **fields)
