"""An OpenAI-compatible server over an engine, as an ASGI application.

    GET /v1/models, GET /v1/models/NAME, GET /health
    POST /v1/completions, POST /v1/chat/completions

Errors have OpenAI's form, {"error": {"message", "type", "param", "code"}}. A client that hangs up
frees its slots.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from moejax.core.errors import InputError
from moejax.io.tokenizer import Tokenizer
from moejax.serve.likelihood import Likelihood, log_likelihoods
from moejax.serve.openai_request import ApiLimits, Asked, parse_chat, parse_completion
from moejax.serve.openai_response import Json, Reply
from moejax.serve.request import Answer, Update
from moejax.serve.worker import EngineStoppedError, EngineWorker

_log = logging.getLogger(__name__)
_LOOK_S = 0.5  # between two looks whether the client is still there
_CLOSED_BY_CLIENT = 499


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """What the server is called and what it takes.

    Attributes:
      model: its name in the API.
      max_body_bytes: of a request. body_timeout_s: in which it must have arrived.
      max_open: samples, waiting or being answered, beyond which new calls are refused.
      max_tokens: most tokens of one answer; None: what fits.
      api_key: what clients must send as a bearer token; None: nothing.
    """

    model: str
    max_body_bytes: int = 1 << 20
    body_timeout_s: float = 30.0
    max_open: int = 128
    max_tokens: int | None = None
    api_key: str | None = None


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str = ""):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or None


def make_app(worker: EngineWorker, tokenizer: Tokenizer, config: ServerConfig) -> Starlette:
    """The application; it starts the worker and stops it when the server ends."""
    server = _Server(worker, tokenizer, config)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(worker.stop)

    routes = [
        Route("/health", server.health),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.one_model),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        ApiError: _on_api_error,
        HTTPException: _on_http,
        Exception: _on_bug,
    }
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


class _Server:
    def __init__(self, worker: EngineWorker, tokenizer: Tokenizer, config: ServerConfig):
        self.worker, self.tokenizer, self.config = worker, tokenizer, config
        self.started = int(time.time())
        self.num_open = 0
        engine = worker.engine
        most = engine.settings.max_logprobs or 0
        self.limits = ApiLimits(engine.max_length, config.max_tokens, most)

    async def health(self, request: Request) -> Response:
        if self.worker.failure is not None:
            raise ApiError(503, "the engine has failed: start the server again")
        engine = self.worker.engine
        found = {"status": "ok", "running": engine.num_running, "open": self.num_open}
        return JSONResponse(found | engine.report())

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        names = [self.config.model, *self.worker.engine.adapters]
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def one_model(self, request: Request) -> Response:
        self._check_key(request)
        name = request.path_params["name"]
        self._check_model(name)
        return JSONResponse(self._model(name))

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, parse_completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, parse_chat)

    # -- one call ----------------------------------------------------------------------------------

    async def _answer(self, request: Request, parse) -> Response:
        self._check_key(request)
        body = await self._body(request)
        name = str(body.get("model"))
        self._check_model(body.get("model"))
        if name != self.config.model:  # an adapter's name, from clients that can set nothing else
            if body.get("adapter") not in (None, name):
                message = f"model {name!r} is one adapter and adapter {body['adapter']!r} another"
                raise ApiError(400, message, "adapter")
            body |= {"adapter": name}
        try:
            asked: Asked = parse(body, self.tokenizer, self.limits)
            for one in asked.requests:
                self.worker.engine.check(one)
        except InputError as error:
            raise ApiError(400, str(error), getattr(error, "param", None)) from None
        num_samples = sum(one.num_samples for one in asked.requests)
        if num_samples > self.config.max_open:  # never possible: no reason to try again
            message = f"{num_samples} answers are wanted, the server takes {self.config.max_open}"
            raise ApiError(400, f"{message} at a time: ask for fewer", "n")
        if self.num_open + num_samples > self.config.max_open:
            raise ApiError(
                429,
                f"{self.num_open} answers are under way and this call wants {num_samples}, the "
                f"server takes {self.config.max_open}: try again later",
                code="rate_limit_exceeded",
            )
        reply = Reply(asked, self.tokenizer, name)
        if asked.streams:
            events = self._events(reply, num_samples)
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        self.num_open += num_samples
        try:
            return await self._whole(request, reply)
        finally:
            self.num_open -= num_samples

    async def _whole(self, request: Request, reply: Reply) -> Response:
        """Waits for all answers, looking now and then whether the client does too."""
        working = asyncio.ensure_future(self._collect(reply))
        try:
            while not working.done():
                await asyncio.wait([working], timeout=_LOOK_S)
                if not working.done() and await request.is_disconnected():
                    return Response(status_code=_CLOSED_BY_CLIENT)
            return JSONResponse(await working)
        except EngineStoppedError as error:
            raise ApiError(503, str(error)) from None
        finally:
            if working.cancel():
                with contextlib.suppress(asyncio.CancelledError):
                    await working

    async def _collect(self, reply: Reply) -> Json:
        asked = reply.asked
        scores = await self._scores(asked)
        answers = [[Answer() for _ in range(r.num_samples)] for r in asked.requests]
        if asked.max_tokens == 0:
            for samples in answers:
                samples[:] = [Answer(finish="length") for _ in samples]
        else:
            async with contextlib.aclosing(self._updates(asked)) as updates:
                async for number, update in updates:
                    answers[number][update.sample].add(update)
        return reply.whole(answers, scores)

    async def _events(self, reply: Reply, num_samples: int) -> AsyncIterator[bytes]:
        """Server-sent events; closing this iterator cancels what is not answered yet."""
        asked = reply.asked
        self.num_open += num_samples
        try:
            scores = await self._scores(asked)
            offsets: list[int] = []
            starts: list[int] = []
            for number, request in enumerate(asked.requests):
                starts.append(len(offsets))
                score = scores[number] if scores else None
                echoed = self.tokenizer.decode(request.prompt) if asked.echo else ""
                for _ in range(request.num_samples):
                    opening = reply.first(len(offsets), request, score)
                    offsets.append(len(echoed))
                    if opening is not None:
                        yield _event(opening)
            num_tokens = 0
            if asked.max_tokens:
                async with contextlib.aclosing(self._updates(asked)) as updates:
                    async for number, update in updates:
                        index = starts[number] + update.sample
                        num_tokens += len(update.ids)
                        if update.text or update.logprobs or update.finish:
                            yield _event(reply.piece(index, update, offsets[index]))
                        offsets[index] += len(update.text)
            if asked.with_usage:
                yield _event(reply.last(num_tokens))
            yield b"data: [DONE]\n\n"
        except EngineStoppedError as error:  # the status is long sent
            yield _event(_error(ApiError(503, str(error))))
        finally:
            self.num_open -= num_samples

    async def _updates(self, asked: Asked) -> AsyncGenerator[tuple[int, Update], None]:
        """Updates of all requests of a call as they come, with the request's number."""
        arrived: asyncio.Queue[tuple[int, Update] | BaseException | None] = asyncio.Queue()

        async def follow(number: int) -> None:
            try:
                async with contextlib.aclosing(
                    self.worker.answers(asked.requests[number])
                ) as updates:
                    async for update in updates:
                        arrived.put_nowait((number, update))
                arrived.put_nowait(None)
            except Exception as error:  # handed to the one who waits
                arrived.put_nowait(error)

        tasks = [asyncio.ensure_future(follow(number)) for number in range(len(asked.requests))]
        try:
            num_left = len(tasks)
            while num_left:
                item = await arrived.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    num_left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _scores(self, asked: Asked) -> list[Likelihood]:
        """Of the prompts, where they are echoed with log-probabilities."""
        if not asked.echo or asked.num_logprobs is None:
            return []
        pairs = [(request.prompt[:1], request.prompt[1:]) for request in asked.requests]
        engine, num_top = self.worker.engine, asked.num_logprobs

        def score() -> list[Likelihood]:
            with engine.laid(asked.requests[0].adapter) as params:
                options = engine.settings.options
                return log_likelihoods(
                    params, engine.config, pairs, num_top=num_top, options=options
                )

        try:
            return await self.worker.call(score)
        except InputError as error:  # an engine that cannot score prompts says so
            raise ApiError(400, str(error), "echo") from None

    # -- checks ------------------------------------------------------------------------------------

    async def _body(self, request: Request) -> Json:
        most = self.config.max_body_bytes
        too_large = ApiError(413, f"the body has more than {most} bytes", code="body_too_large")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(self.config.body_timeout_s):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the body took over {self.config.body_timeout_s:g} s") from None
        except ClientDisconnect:
            raise ApiError(_CLOSED_BY_CLIENT, "the client hung up") from None
        try:
            body = json.loads(bytes(data))
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise ApiError(400, "the body must be a JSON object")
        return body

    def _check_key(self, request: Request) -> None:
        wanted = self.config.api_key
        if wanted is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), wanted.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def _check_model(self, name: Any) -> None:
        names = [self.config.model, *self.worker.engine.adapters]
        if name not in names:
            raise ApiError(
                404,
                f"The model {name!r} does not exist: this server has "
                + ", ".join(repr(one) for one in names),
                "model",
                "model_not_found",
            )

    def _model(self, name: str) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "moejax",
            "max_model_len": self.limits.max_length,
        }


def _event(body: Json) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def _error(error: ApiError) -> Json:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    found = {"message": str(error), "type": kinds.get(error.status, kind)}
    return {"error": found | {"param": error.param, "code": error.code}}


async def _on_api_error(request: Request, error: ApiError) -> Response:
    headers = {"retry-after": "1"} if error.status == 429 else None
    return JSONResponse(_error(error), error.status, headers)


async def _on_http(request: Request, error: HTTPException) -> Response:
    return JSONResponse(_error(ApiError(error.status_code, error.detail)), error.status_code)


async def _on_bug(request: Request, error: Exception) -> Response:
    _log.error("while answering %s", request.url.path, exc_info=error)
    return JSONResponse(_error(ApiError(500, "the server made a mistake")), 500)
