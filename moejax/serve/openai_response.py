"""Answers in the form that clients of OpenAI's API read: whole, or in pieces as they arrive."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterable
from typing import Any

from moejax.io.tokenizer import Tokenizer
from moejax.serve.likelihood import Likelihood
from moejax.serve.openai_request import Asked
from moejax.serve.request import Answer, Request, TokenLogprob, Update

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Reply:
    """One call's answer in the making: its id, its model's name, and how tokens are spelled."""

    asked: Asked
    tokenizer: Tokenizer
    model: str
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, answers: list[list[Answer]], scores: list[Likelihood]) -> Json:
        """The body for all answers; scores: of the prompts, where they are echoed with theirs."""
        choices: list[Json] = []
        for number, (request, samples) in enumerate(zip(self.asked.requests, answers, strict=True)):
            score = scores[number] if scores else None
            for answer in samples:
                choices.append(self._choice(len(choices), request, answer, score))
        num_tokens = sum(len(a.ids) for samples in answers for a in samples)
        return self._envelope(choices, stream=False) | {"usage": self.usage(num_tokens)}

    def first(self, index: int, request: Request, score: Likelihood | None) -> Json | None:
        """The piece that opens a choice of a stream: the role, or the echoed prompt; or nothing."""
        if self.asked.is_chat:
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        elif self.asked.echo:
            opening = Answer(finish="length" if self.asked.max_tokens == 0 else None)
            choice = self._choice(index, request, opening, score)
        else:
            return None
        return self._envelope([choice], stream=True)

    def piece(self, index: int, update: Update, offset: int) -> Json:
        """One update as a piece of a stream; offset: characters of this choice before it."""
        logprobs = self._logprobs(update.ids, update.logprobs, offset)
        choice: Json = {"index": index, "logprobs": logprobs, "finish_reason": update.finish}
        if self.asked.is_chat:
            choice["delta"] = {"content": update.text} if update.text else {}
        else:
            choice["text"] = update.text
        return self._envelope([choice], stream=True)

    def last(self, num_tokens: int) -> Json:
        """The piece with what was used, where the client wants it."""
        return self._envelope([], stream=True) | {"usage": self.usage(num_tokens)}

    def usage(self, num_tokens: int) -> Json:
        """Tokens read (a prompt counts once, whatever its answers) and drawn."""
        num_read = sum(len(request.prompt) for request in self.asked.requests)
        return {
            "prompt_tokens": num_read,
            "completion_tokens": num_tokens,
            "total_tokens": num_read + num_tokens,
        }

    # -- inside ------------------------------------------------------------------------------------

    def _envelope(self, choices: list[Json], stream: bool) -> Json:
        if self.asked.is_chat:
            prefix, kind = "chatcmpl", "chat.completion" + (".chunk" if stream else "")
        else:
            prefix, kind = "cmpl", "text_completion"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(self, index, request: Request, answer: Answer, score: Likelihood | None) -> Json:
        choice: Json = {"index": index, "finish_reason": answer.finish}
        if self.asked.is_chat:
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
            choice["logprobs"] = self._logprobs(answer.ids, answer.logprobs, 0)
            return choice
        before = self.tokenizer.decode(request.prompt) if self.asked.echo else ""
        choice["text"] = before + answer.text
        ids = answer.ids
        known: list[TokenLogprob | None] = [*answer.logprobs]
        if score is not None:
            ids = [*request.prompt, *ids]
            known = [*prompt_logprobs(score), *known]
        choice["logprobs"] = self._logprobs(ids, known, 0 if score is not None else len(before))
        return choice

    def _logprobs(
        self, ids: Iterable[int], logprobs: Iterable[TokenLogprob | None], offset: int
    ) -> Json | None:
        if self.asked.num_logprobs is None:
            return None
        pairs = list(zip(ids, logprobs, strict=True))
        if self.asked.is_chat:
            return {"content": [self._chat_logprob(i, p) for i, p in pairs if p], "refusal": None}
        texts, offsets = [self._spell(i) for i, _ in pairs], []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [p and p.log_prob for _, p in pairs],
            "top_logprobs": [
                p and {self._spell(i): value for i, value in reversed(p.top)} for _, p in pairs
            ],
            "text_offset": offsets,
        }

    def _chat_logprob(self, token: int, logprob: TokenLogprob) -> Json:
        tops = [self._named(i, value) for i, value in logprob.top]
        return self._named(token, logprob.log_prob) | {"top_logprobs": tops}

    def _named(self, token: int, value: float) -> Json:
        text = self._spell(token)
        whole = "\ufffd" not in text  # else the bytes of a character's part, which it hides
        return {"token": text, "logprob": value, "bytes": list(text.encode()) if whole else None}

    def _spell(self, token: int) -> str:
        return self.tokenizer.id_to_text(token)


def prompt_logprobs(score: Likelihood) -> list[TokenLogprob | None]:
    """Of every token of a prompt; the first has none."""
    rows = zip(score.top_ids, score.top_log_probs, strict=True)
    tops = [tuple(zip(ids, values, strict=True)) for ids, values in rows]
    tops = tops or [()] * len(score.token_log_probs)
    each = zip(score.token_log_probs, tops, strict=True)
    return [None, *(TokenLogprob(value, top) for value, top in each)]
