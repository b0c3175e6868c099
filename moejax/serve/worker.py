"""An engine in a thread of its own, for callers that live in an asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

from moejax.serve.engine import Engine
from moejax.serve.grafted_engine import GraftedEngine
from moejax.serve.request import Request, Update

_log = logging.getLogger(__name__)


class EngineStoppedError(RuntimeError):
    """The engine failed, or was told to stop, before a request was answered."""


# What the thread is asked to run, and how to say that it will not be.
_Ask = tuple[Callable[[], None], Callable[[EngineStoppedError], None]]
_Tell = Callable[[Update | EngineStoppedError], None]


class EngineWorker:
    """Owns an engine: its thread alone touches it, and what came out is handed to the loop.

    `answers` yields a request's updates; leaving that iterator early, as when a client hangs up,
    cancels the request and frees its slots. `failure` is what ended the thread, if something did.
    """

    def __init__(self, engine: Engine | GraftedEngine):
        self.engine = engine
        self.failure: BaseException | None = None
        self._inbox: queue.SimpleQueue[_Ask | None] = queue.SimpleQueue()
        self._listeners: dict[int, _Tell] = {}
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._ended = False
        self._lock = threading.Lock()  # nothing enters the inbox once the thread has ended

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step; what is not answered fails."""
        self._inbox.put(None)
        self._thread.join()

    async def answers(self, request: Request) -> AsyncGenerator[Update, None]:
        """The updates of all samples, until each has finished; InputError as `Engine.check`."""
        self.engine.check(request)
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Update | EngineStoppedError] = asyncio.Queue()
        ids: list[int] = []

        def tell(update: Update | EngineStoppedError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(arrived.put_nowait, update)

        def submit() -> None:
            ids.append(self.engine.submit(request))
            self._listeners[ids[0]] = tell

        def cancel() -> None:
            if self._listeners.pop(ids[0], None):
                self.engine.cancel(ids[0])

        self._ask((submit, tell))
        try:
            waiting_for = request.num_samples
            while waiting_for:
                update = await arrived.get()
                if isinstance(update, EngineStoppedError):
                    raise update
                waiting_for -= update.finish is not None
                yield update
        finally:
            with contextlib.suppress(EngineStoppedError):
                self._ask((cancel, lambda error: None))

    async def call(self, function: Callable[[], Any]) -> Any:
        """The result of a function that runs in the engine's thread, between two steps."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Any] = loop.create_future()

        def settle(set_result: Callable[[Any], None], outcome: Any) -> None:
            def in_loop() -> None:
                if not result.done():
                    set_result(outcome)

            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(in_loop)

        def run() -> None:
            try:
                settle(result.set_result, function())
            except Exception as error:  # handed to who asked, whatever it is
                settle(result.set_exception, error)

        self._ask((run, lambda error: settle(result.set_exception, error)))
        return await result

    # -- inside ------------------------------------------------------------------------------------

    def _ask(self, what: _Ask) -> None:
        with self._lock:
            if self._ended:
                raise self._stopped()
            self._inbox.put(what)

    def _stopped(self) -> EngineStoppedError:
        return EngineStoppedError(f"the engine has stopped: {self.failure or 'it was told to'}")

    def _work(self) -> None:
        try:
            while True:
                while not self._inbox.empty() or not self.engine.is_busy:
                    asked = self._inbox.get()
                    if asked is None:
                        return
                    asked[0]()
                for update in self.engine.step():
                    listener = self._listeners.get(update.request_id)
                    if listener is not None:
                        listener(update)
        except Exception as error:  # whatever it is, those who wait are told
            self.failure = error
            _log.error("the engine failed", exc_info=error)
        finally:
            with self._lock:
                self._ended = True
            for tell in self._listeners.values():
                tell(self._stopped())
            while not self._inbox.empty():
                asked = self._inbox.get()
                if asked is not None:
                    asked[1](self._stopped())
