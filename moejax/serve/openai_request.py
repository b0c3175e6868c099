"""What clients of OpenAI's API send, checked and turned into requests of the engine.

The fields of https://platform.openai.com/docs/api-reference/completions and /chat that a language
model alone can honour; beside them `top_k` and `min_p`, as other servers have, `adapter`, for a
grafted model `sources`, and for one with a predictor `sparsity`. What would change an answer and is
not supported is refused by name and never ignored.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from moejax.core.errors import InputError
from moejax.io.tokenizer import Tokenizer
from moejax.serve.request import Request
from moejax.serve.sampling import SamplingConfig

MAX_STOPS = 16
MAX_CHOICES = 128
# Said about a request, not about its answer.
_IGNORED = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
_SHARED = {"model", "n", "stream", "stream_options", "stop", "seed", "temperature", "top_p"}
_SHARED |= {"top_k", "min_p", "max_tokens", "adapter", "sources", "sparsity"}
_COMPLETION = _SHARED | {"prompt", "echo", "logprobs", "best_of"}
_CHAT = _SHARED | {"messages", "max_completion_tokens", "logprobs", "top_logprobs"}
# Refused unless they say what happens anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
}


class BadRequestError(InputError):
    """A field that cannot be honoured; param: its name."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


@dataclasses.dataclass(frozen=True)
class Asked:
    """A call of the API.

    Attributes:
      requests: one per prompt; none draws anything if max_tokens is 0.
      is_chat, streams, with_usage: the form of the answer.
      echo: the prompt stands before the answer. max_tokens: 0 with echo draws nothing.
      num_logprobs: None without log-probabilities.
    """

    requests: tuple[Request, ...]
    is_chat: bool
    streams: bool
    with_usage: bool
    max_tokens: int
    echo: bool = False
    num_logprobs: int | None = None


@dataclasses.dataclass(frozen=True)
class ApiLimits:
    """What a call may ask for: tokens of a row, of an answer (None: what fits), likely tokens."""

    max_length: int
    max_tokens: int | None = None
    max_logprobs: int = 20


def parse_completion(body: Mapping[str, Any], tokenizer: Tokenizer, limits: ApiLimits) -> Asked:
    """POST /v1/completions; BadRequestError names the field that is wrong."""
    _check_fields(body, _COMPLETION)
    if "prompt" not in body:
        raise BadRequestError("prompt is missing", "prompt")
    n = _number(body, "n", 1, 1, MAX_CHOICES)
    if body.get("best_of") not in (None, n):
        message = f"best_of is {body['best_of']}: only n, which is {n}, is made"
        raise BadRequestError(message, "best_of")
    num_logprobs = _optional(body, "logprobs", 0, limits.max_logprobs)
    echo = _flag(body, "echo")
    prompts = _prompts(body["prompt"], tokenizer)
    if n * len(prompts) > MAX_CHOICES:
        message = f"{n * len(prompts)} answers are asked for, at most {MAX_CHOICES}"
        raise BadRequestError(message, "n")
    most = _number(body, "max_tokens", 16, 0, 2**31 - 1)
    if most == 0 and not echo:
        raise BadRequestError("max_tokens is 0: give 1 or more, or echo the prompt", "max_tokens")
    make = _maker(body, n, num_logprobs, most, tokenizer, limits)
    return Asked(tuple(make(ids) for ids in prompts), False, *_form(body), most, echo, num_logprobs)


def parse_chat(body: Mapping[str, Any], tokenizer: Tokenizer, limits: ApiLimits) -> Asked:
    """POST /v1/chat/completions; BadRequestError names the field that is wrong."""
    _check_fields(body, _CHAT)
    messages = [_message(m, i) for i, m in enumerate(_list(body, "messages"))]
    try:
        ids = tokenizer.encode_prompt(messages)
    except InputError as error:
        raise BadRequestError(str(error), "messages") from None
    top = _optional(body, "top_logprobs", 0, limits.max_logprobs)
    wants = _flag(body, "logprobs")
    if top is not None and not wants:
        raise BadRequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    num_logprobs = (top or 0) if wants else None
    n = _number(body, "n", 1, 1, MAX_CHOICES)
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    most = _number(body, name, limits.max_length, 1, 2**31 - 1)
    make = _maker(body, n, num_logprobs, most, tokenizer, limits)
    return Asked((make(ids),), True, *_form(body), most, False, num_logprobs)


# -- inside ----------------------------------------------------------------------------------------


def _check_fields(body: Mapping[str, Any], known: set[str]) -> None:
    for name, value in body.items():
        if name in known or name in _IGNORED or value is None:
            continue
        if name not in _NEUTRAL:
            raise BadRequestError(f"Unrecognized request argument supplied: {name}", name)
        if value not in _NEUTRAL[name]:
            raise BadRequestError(f"{name} is not supported here: leave it out", name)


def _maker(body, n: int, num_logprobs: int | None, most: int, tokenizer, limits: ApiLimits):
    """A function from prompt ids to a request with the call's settings."""
    sampling = SamplingConfig(
        temperature=_float(body, "temperature", 1.0, 0, 2),
        top_k=_number(body, "top_k", 0, 0, 2**31 - 1),
        top_p=_float(body, "top_p", 1.0, 0, 1) or 1e-9,  # 0: the most likely token alone
        min_p=_float(body, "min_p", 0.0, 0, 1),
    )
    seed = _optional(body, "seed", -(2**63), 2**63 - 1)
    seed = secrets.randbits(32) if seed is None else seed
    stop = body.get("stop")
    stop = [stop] if isinstance(stop, str) else stop or []
    texts = isinstance(stop, list) and all(isinstance(s, str) and s for s in stop)
    if not texts or len(stop) > MAX_STOPS:
        message = f"stop must be a text or a list of up to {MAX_STOPS}, none empty"
        raise BadRequestError(message, "stop")

    adapter = body.get("adapter")
    if not isinstance(adapter, str | None):
        raise BadRequestError(f"adapter must be a name, got {adapter!r}", "adapter")

    sources = body.get("sources")
    if sources is not None and not (
        isinstance(sources, list) and all(isinstance(s, str) for s in sources)
    ):
        raise BadRequestError(f"sources must be a list of names, got {sources!r}", "sources")

    sparsity = _float(body, "sparsity", 0.0, 0, 1)
    if sparsity == 1:
        raise BadRequestError("sparsity must be below 1: it is the share not computed", "sparsity")

    def make(ids: list[int]) -> Request:
        if len(ids) + (most > 0) > limits.max_length:
            raise BadRequestError(
                f"This model's maximum context length is {limits.max_length} tokens, and the "
                f"prompt has {len(ids)}: shorten it",
                "messages" if "messages" in body else "prompt",
            )
        return Request(
            prompt=tuple(ids),
            max_new_tokens=max(1, min(most, limits.max_tokens or most)),
            sampling=sampling,
            seed=(seed + 2**31) % 2**32 - 2**31,
            num_samples=n,
            stop_ids=tuple(tokenizer.eos_ids),
            stop=tuple(stop),
            num_logprobs=num_logprobs,
            adapter=adapter,
            sources=None if sources is None else tuple(sources),
            sparsity=None if body.get("sparsity") is None else sparsity,
        )

    return make


def _form(body) -> tuple[bool, bool]:
    streams = _flag(body, "stream")
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping) or (options and not streams):
        raise BadRequestError("stream_options needs stream to be true", "stream_options")
    return streams, bool(options.get("include_usage", False))


def _prompts(prompt: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """A text, ids, or a list of either."""
    is_one = isinstance(prompt, str) or (isinstance(prompt, list) and _are_ids(prompt))
    several = [prompt] if is_one else prompt
    if not isinstance(several, list) or not several:
        raise BadRequestError("prompt must be a text, token ids, or a list of either", "prompt")
    found = []
    for one in several:
        if isinstance(one, str):
            found.append(tokenizer.encode(one, add_special=True) or _start_of_text(tokenizer))
        elif isinstance(one, list) and one and _are_ids(one):
            found.append(one)
        else:
            raise BadRequestError("prompt must be a text, token ids, or a list of either", "prompt")
    return found


def _start_of_text(tokenizer: Tokenizer) -> list[int]:
    """What stands for an empty text."""
    first = tokenizer.bos_id
    return [first if first is not None else (*tokenizer.eos_ids, 0)[0]]


def _are_ids(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)


def _message(message: Any, index: int) -> dict[str, str]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRequestError(f"{where} must be an object with a role and a content", "messages")
    content = message.get("content")
    if isinstance(content, list):
        parts = [p["text"] for p in content if isinstance(p, Mapping) and _is_text_part(p)]
        if len(parts) != len(content):
            raise BadRequestError(f"{where}: only parts of type text can be read", "messages")
        content = "".join(parts)
    if not isinstance(content, str):
        raise BadRequestError(f"{where} has no content that is a text", "messages")
    role = message["role"]
    return {"role": "system" if role == "developer" else role, "content": content}


def _is_text_part(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "text" and isinstance(part.get("text"), str)


def _list(body, name: str) -> list[Any]:
    value = body.get(name)
    if not isinstance(value, list) or not value:
        raise BadRequestError(f"{name} must be a list that is not empty", name)
    return value


def _flag(body, name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise BadRequestError(f"{name} must be true or false, got {value!r}", name)
    return bool(value)


def _number(body, name: str, default: int, least: int, most: int) -> int:
    value = _optional(body, name, least, most)
    return default if value is None else value


def _optional(body, name: str, least: int, most: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadRequestError(
            f"{name} must be a whole number from {least} to {most}, got {value!r}", name
        )
    return value


def _float(body, name: str, default: float, least: float, most: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        message = f"{name} must be a number from {least} to {most}, got {value!r}"
        raise BadRequestError(message, name)
    return float(value)
