"""Chat templates: the jinja dialect that Hugging Face models carry, in a sandbox.

A template comes with a checkpoint, so it is untrusted code: it runs in jinja's immutable sandbox
and sees only plain strings. Globals, filters and whitespace rules are those transformers documents
("Writing a chat template"), so the text is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moejax.core.errors import InputError


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks answers elsewhere; here it is its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(fmt: str) -> str:
    return datetime.now().strftime(fmt)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja's own filter escapes HTML characters, which templates do not expect
    allowed = {k: v for k, v in options.items() if k in ("indent", "separators", "sort_keys")}
    return json.dumps(value, ensure_ascii=ensure_ascii, **allowed)


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template."""

    template: jinja2.Template

    @classmethod
    def compile(cls, source: str) -> ChatTemplate:
        """Compile; InputError with the line for a template with a syntax error."""
        return _compile(source)

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The conversation as text; InputError where the template refuses it."""
        try:
            return self.template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"the chat template refuses these messages: {reason}") from error


@lru_cache(maxsize=32)
def _compile(source: str) -> ChatTemplate:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return ChatTemplate(environment.from_string(source))
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"the chat template has a syntax error in line {error.lineno}: {error.message}"
        ) from error


def check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    """InputError unless every message has a `role` and a `content` that are strings."""
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(
                f"message {i} is a {type(message).__name__}; give {{'role': .., 'content': ..}}"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                kind = type(message.get(key)).__name__
                raise InputError(f"message {i}: {key!r} must be a string, not {kind}")
