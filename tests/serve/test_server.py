"""The server as clients meet it: through the real `openai` client, over a real socket."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time

import httpx2
import jax
import numpy as np
import openai
import pytest
import uvicorn

from moejax.io.tokenizer import Tokenizer
from moejax.methods import esft_delta
from moejax.methods.expert_config import ExpertConfig
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig
from moejax.ops.rope import RopeConfig
from moejax.serve.engine import Engine
from moejax.serve.http import ServerConfig, make_app
from moejax.serve.likelihood import log_likelihoods
from moejax.serve.request import EngineConfig, Request
from moejax.serve.sampling import SamplingConfig
from moejax.serve.worker import EngineStoppedError, EngineWorker
from tests.serve.test_generate import TINY, random_params
from tests.tiny_tokenizer import gguf_fields

TOKENIZER = Tokenizer.from_gguf_metadata(gguf_fields())
CONFIG = ModelConfig(
    **{
        name: getattr(TINY, name)
        for name in ("family", "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads")
    },
    head_size=8,
    vocab_size=TOKENIZER.vocab_size,
    max_position=256,
    rope=RopeConfig(theta=10000.0),
)
SETTINGS = EngineConfig(
    num_slots=3, max_length=160, page_size=16, prefill_chunk=16, num_steps=4, max_logprobs=5
)


class Served:
    """A server in a thread: its address, its worker, and clients for it."""

    def __init__(self, engine: Engine | None = None, **config):
        engine = engine or Engine(random_params(CONFIG), CONFIG, SETTINGS, TOKENIZER.decode)
        self.worker = EngineWorker(engine)
        server_config = ServerConfig("tiny", max_body_bytes=20_000, max_open=6, **config)
        self.app = make_app(self.worker, TOKENIZER, server_config)
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="warning", lifespan="on"))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def post(self, path: str, body) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx2.post(f"{self.url}/v1/{path}", content=content, timeout=120)

    def wait_until(self, holds) -> None:
        deadline = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture(scope="module")
def served():
    with Served() as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    return served.client()


def directly(request: Request):
    """The answers of an engine without a server."""
    engine = Engine(random_params(CONFIG), CONFIG, SETTINGS, TOKENIZER.decode)
    return engine.run([request])[0]


def test_models(client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "moejax"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_a_call_names_its_adapter():
    config = dataclasses.replace(CONFIG, moe=MoEConfig(num_experts=4, top_k=2))
    base = jax.tree.map(np.asarray, random_params(config))
    other = jax.tree.map(lambda w: w[..., ::-1], base)
    delta = esft_delta.extract(other, config, ExpertConfig({0: (1, 2, 3), 1: (1, 2, 3)}))
    ids = TOKENIZER.encode("hello 12")
    tuned = Engine(esft_delta.insert(base, config, delta), config, SETTINGS, TOKENIZER.decode)
    (wanted,) = tuned.run([Request(tuple(ids), 9, SamplingConfig(0.0))])[0]
    (nll,) = log_likelihoods(tuned.params, config, [(ids[:1], ids[1:])])
    engine = Engine(base, config, SETTINGS, TOKENIZER.decode, {"law": delta})
    ask = {"prompt": "hello 12", "max_tokens": 9, "temperature": 0}
    with Served(engine) as server:
        client = server.client()
        assert [m.id for m in client.models.list()] == ["tiny", "law"]
        plain, named, as_model = (
            client.completions.create(**ask, **more).choices[0].text
            for more in (
                {"model": "tiny"},
                {"model": "tiny", "extra_body": {"adapter": "law"}},
                {"model": "law"},
            )
        )
        assert named == as_model == wanted.text != plain
        echoed = client.completions.create(model="law", echo=True, logprobs=1, **ask).choices[0]
        said = sum(echoed.logprobs.token_logprobs[1 : len(ids)])
        assert said == pytest.approx(nll.log_prob, abs=1e-4)
        for more in ({"adapter": "other"}, {"adapter": 3}):
            with pytest.raises(openai.BadRequestError, match="adapter"):
                client.completions.create(model="tiny", **ask, extra_body=more)


def test_a_completion_is_the_engines(client):
    ids = TOKENIZER.encode("hello 12")
    done = client.completions.create(
        model="tiny", prompt="hello 12", max_tokens=9, n=2, seed=7, temperature=0.8, top_p=0.9,
        logprobs=3,
    )  # fmt: skip
    expected = directly(
        Request(
            tuple(ids), 9, SamplingConfig(0.8, top_p=0.9), 7, num_samples=2, num_logprobs=3,
            stop_ids=TOKENIZER.eos_ids,
        )
    )  # fmt: skip
    assert [c.text for c in done.choices] == [a.text for a in expected]
    assert [c.index for c in done.choices] == [0, 1]
    assert [c.finish_reason for c in done.choices] == [a.finish for a in expected]
    for choice, answer in zip(done.choices, expected, strict=True):
        assert choice.logprobs.token_logprobs == [p.log_prob for p in answer.logprobs]
        assert all(len(top) <= 3 for top in choice.logprobs.top_logprobs)
    usage = done.usage
    assert usage.prompt_tokens == len(ids)
    assert usage.completion_tokens == sum(len(a.ids) for a in expected)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert done.object == "text_completion" and done.model == "tiny"


def test_an_echo_with_log_probabilities_scores_the_prompt(client):
    """What harnesses use for log-likelihoods: nothing is drawn, and several prompts go at once."""
    texts = ["hello hello ab", "12"]
    done = client.completions.create(
        model="tiny", prompt=[TOKENIZER.encode(t) for t in texts], max_tokens=0, echo=True,
        logprobs=1,
    )  # fmt: skip
    pairs = [(ids[:1], ids[1:]) for ids in map(TOKENIZER.encode, texts)]
    expected = log_likelihoods(random_params(CONFIG), CONFIG, pairs, num_top=1)
    for choice, score, text in zip(done.choices, expected, texts, strict=True):
        assert choice.text == text
        first, *rest = choice.logprobs.token_logprobs
        assert first is None and choice.logprobs.top_logprobs[0] is None
        np.testing.assert_allclose(rest, score.token_log_probs, atol=1e-5)
        offsets = choice.logprobs.text_offset
        assert [text[a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)] == (
            choice.logprobs.tokens
        )
    assert done.usage.completion_tokens == 0
    more = client.completions.create(
        model="tiny", prompt="12", max_tokens=3, echo=True, logprobs=0, temperature=0
    ).choices[0]
    assert more.text.startswith("12") and len(more.logprobs.tokens) == 2 + 3


def test_a_chat_streams_what_it_would_answer(client):
    asked = {
        "model": "tiny",
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        ],
        "max_completion_tokens": 12,
        "seed": 3,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**asked)
    texts, finishes, tokens, usage = ["", ""], [None, None], [0, 0], None
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
            tokens[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
    assert texts == [c.message.content for c in whole.choices]
    assert finishes == [c.finish_reason for c in whole.choices]
    assert usage == whole.usage and sum(tokens) == usage.completion_tokens
    assert all(finishes) and any(texts)
    first = next(p for c in whole.choices for p in c.logprobs.content)
    assert len(first.top_logprobs) == 2 and first.logprob <= first.top_logprobs[0].logprob


def test_stop_strings_end_text_and_stream(client):
    asked = {"model": "tiny", "prompt": "ab", "temperature": 0, "max_tokens": 40}
    free = client.completions.create(**asked).choices[0].text
    stop = free[5:8]
    stopped = client.completions.create(**asked, stop=[stop, "never"]).choices[0]
    assert stopped.text == free[: free.find(stop)] and stopped.finish_reason == "stop"
    pieces = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == stopped.text


def test_a_client_that_hangs_up_frees_its_slots(served, client):
    """Both while a stream is read and while a whole answer is waited for."""
    engine = served.worker.engine
    asked = {"model": "tiny", "prompt": "ab", "max_tokens": 150, "n": 3, "seed": 1}
    stream = client.completions.create(**asked, stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="3 answers are under way and .* wants 4"):
        client.completions.create(**asked | {"n": 4})
    stream.close()
    served.wait_until(lambda: not engine.is_busy)
    with contextlib.suppress(httpx2.ReadTimeout):
        httpx2.post(f"{served.url}/v1/completions", json=asked, timeout=0.05)
    served.wait_until(lambda: not engine.is_busy)
    assert engine.num_free_pages == 33
    served.wait_until(lambda: httpx2.get(f"{served.url}/health").json()["open"] == 0)


@pytest.mark.parametrize(
    "path, changes, status, param",
    [
        ("completions", {"model": "other"}, 404, "model"),
        ("completions", {"prompt": None}, 400, "prompt"),
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", {"prompt": [["a"]]}, 400, "prompt"),
        ("completions", {"prompt": "a" * 170}, 400, "prompt"),
        ("completions", {"max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"max_tokens": "many"}, 400, "max_tokens"),
        ("completions", {"temperature": -1}, 400, "temperature"),
        ("completions", {"temperature": True}, 400, "temperature"),
        ("completions", {"top_p": 2}, 400, "top_p"),
        ("completions", {"n": 0}, 400, "n"),
        ("completions", {"n": 100, "prompt": ["a", "b"]}, 400, "n"),
        ("completions", {"n": 7}, 400, "n"),
        ("completions", {"best_of": 3}, 400, "best_of"),
        ("completions", {"logprobs": 6}, 400, "logprobs"),
        ("completions", {"stop": [""]}, 400, "stop"),
        ("completions", {"seed": 0.5}, 400, "seed"),
        ("completions", {"stream": 1}, 400, "stream"),
        ("completions", {"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ("completions", {"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ("completions", {"repetition": 1}, 400, "repetition"),
        ("chat/completions", {"messages": "hi"}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages"),
        ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs"),
        ("chat/completions", {"tools": [{"type": "function"}]}, 400, "tools"),
    ],
)
def test_bad_fields_are_named(served, path, changes, status, param):
    body = {"model": "tiny"}
    if path == "completions":
        body["prompt"] = "hello"
    else:
        body["messages"] = [{"role": "user", "content": "hello"}]
    answer = served.post(path, body | changes)
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"] and "\n" not in error["message"]


def test_bad_bodies_and_paths(served):
    for body, status in ((b"{", 400), (b"[]", 400), (b'"' + b"a" * 20_000 + b'"', 413)):
        answer = served.post("completions", body)
        assert answer.status_code == status and answer.json()["error"]["message"]
    # Without a length in the header, so that it is counted as it comes.
    endless = (b" " * 1000 for _ in range(100))
    answer = httpx2.post(f"{served.url}/v1/completions", content=endless, timeout=60)
    assert answer.status_code == 413
    assert httpx2.get(f"{served.url}/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert httpx2.get(f"{served.url}/v1/completions").status_code == 405
    assert httpx2.get(f"{served.url}/health").json()["status"] == "ok"


def test_keys_limits_and_a_failing_engine():
    """An engine that fails answers everybody, says so, and takes nothing more."""
    with Served(api_key="secret", max_tokens=4) as served:
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            served.client("guess").models.list()
        client = served.client("secret")
        short = client.completions.create(model="tiny", prompt="ab", max_tokens=50)
        assert short.usage.completion_tokens <= 4

        def fail():
            raise OSError("out of luck")

        served.worker.engine.step = fail
        with pytest.raises(openai.InternalServerError, match="the engine has stopped"):
            client.completions.create(model="tiny", prompt="ab")
        with pytest.raises(openai.InternalServerError, match="out of luck"):
            client.completions.create(model="tiny", prompt="ab")
        assert httpx2.get(f"{served.url}/health").status_code == 503


def test_a_worker_that_stops_leaves_nobody_waiting():
    worker = EngineWorker(Engine(random_params(CONFIG), CONFIG, SETTINGS))

    async def ask():
        return [update async for update in worker.answers(Request((1,), 100))]

    async def main():
        asking = asyncio.ensure_future(ask())
        await asyncio.sleep(0)
        worker.start()
        await asyncio.to_thread(worker.stop)
        with pytest.raises(EngineStoppedError):
            await asking
        with pytest.raises(EngineStoppedError):
            await worker.call(lambda: 1)

    asyncio.run(main())
