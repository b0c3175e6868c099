"""Two processes that share no trust: one holds the candidate, the other the tests.

Runs inside the sandbox's child only (standard library, no packages). The tests call a stand-in,
whose arguments cross to the candidate as plain data and whose results come back as plain data; the
tests, what they expect and the pipe on which the verdict is written never enter the candidate's
process.
"""

import builtins
import json
import os
import sys
import traceback
import types

import plain

_MAX_MESSAGE_BYTES = 16 << 20
_MAX_DIGITS = 200_000  # of integers as text: factorials are honest answers


class _Gone(BaseException):
    """The candidate's end of the pipe is closed, or what came out of it is no reply."""


def send(fd: int, record: dict) -> None:
    """Writes one length-prefixed JSON object."""
    data = json.dumps(record).encode()
    data = len(data).to_bytes(8, "big") + data
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> dict:
    """Reads one length-prefixed JSON object; EOFError where there is none or it is too long."""
    size = int.from_bytes(_read_exactly(fd, 8), "big")
    if size > _MAX_MESSAGE_BYTES:
        raise EOFError(f"a message of {size} bytes")
    return json.loads(_read_exactly(fd, size))


def _read_exactly(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError("the pipe is closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# -- the candidate's side --------------------------------------------------------------------------


def answer_calls(module: types.ModuleType, function: str, call_fd: int, reply_fd: int) -> int:
    """Answers one call after another until the tests hang up; returns the exit code."""
    sys.set_int_max_str_digits(_MAX_DIGITS)
    if not callable(getattr(module, function, None)):
        send(reply_fd, {"missing": function})
        return 1
    send(reply_fd, {"ready": True})
    while True:
        try:
            call = receive(call_fd)
        except EOFError:
            return 0
        send(reply_fd, _answer(module, call))


def _answer(module: types.ModuleType, call: dict) -> dict:
    try:
        arguments = [plain.decode(argument) for argument in call["arguments"]]
        keywords = {name: plain.decode(value) for name, value in call["keywords"].items()}
        value = getattr(module, call["function"])(*arguments, **keywords)
        record = {"value": plain.encode_loosely(value)}
        if len(json.dumps(record)) > _MAX_MESSAGE_BYTES:
            return {"error": ["ValueError", "the result is too long"]}
        return record
    except BaseException as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        known = next((name for name in kinds if hasattr(builtins, name)), "Exception")
        text = str(error) if known == kinds[0] else f"{kinds[0]}: {error}"
        return {"error": [known, text[:500]]}


# -- the tests' side -------------------------------------------------------------------------------


class _Exam:
    """The stand-ins that tests call, and what happened on the way."""

    def __init__(self, call_fd: int, reply_fd: int) -> None:
        self.call_fd, self.reply_fd, self.num_calls = call_fd, reply_fd, 0
        self.cannot_cross = ""

    def ask(self, function: str, arguments: tuple, keywords: dict) -> object:
        try:
            call = {
                "function": function,
                "arguments": [plain.encode_loosely(value) for value in arguments],
                "keywords": {name: plain.encode_loosely(v) for name, v in keywords.items()},
            }
        except ValueError as error:
            self.cannot_cross = str(error)
            raise
        self.num_calls += 1
        try:
            send(self.call_fd, call)
            reply = receive(self.reply_fd)
            if "error" in reply:
                kind, text = reply["error"]
            else:
                return plain.decode(reply["value"])
        except (OSError, EOFError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise _Gone(str(error)) from error
        raise _as_exception(str(kind), str(text))

    def stand_in(self, function: str):
        def candidate(*arguments, **keywords):
            try:
                return self.ask(function, arguments, keywords)
            except _Gone:
                os._exit(3)  # at once: a bare `except:` in the tests must not swallow it

        return candidate


def _as_exception(kind: str, text: str) -> Exception:
    found = getattr(builtins, kind, None)
    if not (isinstance(found, type) and issubclass(found, Exception)):
        found = RuntimeError
    try:
        return found(text)
    except TypeError:  # UnicodeDecodeError and its like want more arguments
        return RuntimeError(text)


def run_tests(exam: dict, call_fd: int, reply_fd: int) -> dict:
    """Runs `exam["test"]` with stand-ins for `exam["names"]`; returns what the verdict rests on."""
    sys.set_int_max_str_digits(_MAX_DIGITS)
    try:
        first = receive(reply_fd)
    except (EOFError, ValueError, RecursionError):
        os._exit(3)
    if "ready" not in first:
        return {"error": f"NameError: the program defines no {exam['names'][0]}"}
    state = _Exam(call_fd, reply_fd)
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    scope = module.__dict__
    source = exam["test"]
    try:
        exec(compile(exam["setup"], "<setup>", "exec"), scope)  # noqa: S102
        for name in exam["names"]:
            scope[name] = state.stand_in(name)
        scope["candidate"] = scope[exam["names"][0]]
        exec(compile(source, "<tests>", "exec"), scope)  # noqa: S102
    except BaseException as error:
        if state.cannot_cross:
            return {"error": f"cannot cross: {state.cannot_cross}"}
        return {"error": _describe(error, source)}
    if not state.num_calls:
        return {"error": "the tests made no call"}
    return {"value": True}


def _describe(error: BaseException, source: str) -> str:
    """The error, and the line of the tests where it came up."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == "<tests>"]
    lines = source.splitlines()
    number = frames[-1].lineno if frames else None
    line = lines[number - 1].strip() if number and number <= len(lines) else ""
    return f"{type(error).__name__}: {error}"[:300] + (f" at `{line[:200]}`" if line else "")
