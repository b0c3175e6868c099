"""A grafted model behind the server's engine: the answers of one text alone, sources by request."""

from __future__ import annotations

import jax
import pytest

from moejax.core.errors import InputError
from moejax.serve.grafted import Grafted, GraftedText
from moejax.serve.grafted_engine import GraftedEngine
from moejax.serve.openai_request import ApiLimits, BadRequestError, parse_completion
from moejax.serve.request import EngineConfig, Request
from moejax.serve.sampling import SamplingConfig
from tests.serve.test_grafted import FIRST, PROMPT, pair


def engine() -> GraftedEngine:
    first, second = pair("same"), pair("settled")
    both = Grafted(
        first.target, first.target_params,
        {"a": first.lenders["source"], "b": second.lenders["source"]},
    )
    settings = EngineConfig(num_slots=2, max_length=48, max_logprobs=3)
    return GraftedEngine(both, settings, FIRST.decode)


def test_each_request_has_its_sources_and_its_own_answer():
    served, ids = engine(), tuple(FIRST.encode(PROMPT, add_special=True))
    asked = [None, ("a",), ()]
    requests = [Request(ids, 4, SamplingConfig(0), num_logprobs=2, sources=s) for s in asked]
    answers = [found[0] for found in served.run(requests)]
    for sources, answer in zip(asked, answers, strict=True):
        text = GraftedText(served.model, ids, 4, sources, room=48)
        drawn = list(text.draw(SamplingConfig(0), jax.random.key(0), ends=()))
        assert answer.ids == [d.id for d in drawn] and answer.finish == "length"
        assert answer.text == FIRST.decode(answer.ids)
        best = answer.logprobs[0]
        assert best.top[0] == (answer.ids[0], pytest.approx(best.log_prob)) and len(best.top) == 2
    first = [a.logprobs[0].log_prob for a in answers]
    assert len(set(first)) == 3  # every choice of sources has its own distribution


def test_stops_samples_and_cancelling():
    served, ids = engine(), tuple(FIRST.encode(PROMPT, add_special=True))
    request = Request(ids, 5, SamplingConfig(1.0), num_samples=3, seed=1)
    answers = served.run([request])[0]
    assert len(answers) == 3 and len({tuple(a.ids) for a in answers}) > 1
    stopped = served.run([Request(ids, 5, SamplingConfig(0), stop_ids=(answers[0].ids[0],))])
    assert stopped[0][0].finish in ("stop", "length")
    number = served.submit(request)
    served.step()
    assert served.num_running == 2 and served.num_waiting == 1
    served.cancel(number)
    assert not served.is_busy


def test_what_is_refused():
    served, ids = engine(), tuple(FIRST.encode(PROMPT, add_special=True))
    with pytest.raises(InputError, match="source 'c' is unknown: there is a, b"):
        served.submit(Request(ids, 4, sources=("c",)))
    with pytest.raises(InputError, match="shorten the prompt"):
        served.check(Request(ids * 9, 4))
    with pytest.raises(InputError, match="does not score prompts"), served.laid(None):
        pass
    body = {"prompt": "x", "sources": ["a"]}
    assert parse_completion(body, FIRST, ApiLimits(48)).requests[0].sources == ("a",)
    with pytest.raises(BadRequestError, match="list of names"):
        parse_completion({"prompt": "x", "sources": "a"}, FIRST, ApiLimits(48))
