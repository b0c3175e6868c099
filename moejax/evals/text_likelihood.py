"""From texts to the token pairs whose log-likelihoods a model is asked for.

The conventions are those of lm-evaluation-harness, so that figures compare: a context's trailing
spaces belong to the continuation, both are tokenised together, and a text alone is conditioned on
the model's BOS (or its first end-of-text id).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from moejax.core.errors import InputError
from moejax.io.tokenizer import Tokenizer
from moejax.serve.likelihood import Likelihood

Pair = tuple[list[int], list[int]]
# Token pairs to their log-likelihoods, in order.
LikelihoodFn = Callable[[Sequence[Pair]], Sequence[Likelihood]]


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How texts become tokens of one model.

    Attributes:
      tokenizer: the model's.
      max_tokens: most tokens that it reads.
      add_bos: whether contexts begin with BOS.
    """

    tokenizer: Tokenizer
    max_tokens: int
    add_bos: bool = False

    @property
    def prefix_id(self) -> int:
        """What a text without a context is conditioned on."""
        if self.tokenizer.bos_id is not None:
            return self.tokenizer.bos_id
        if not self.tokenizer.eos_ids:
            raise InputError("the tokenizer has neither BOS nor end of text to begin with")
        return self.tokenizer.eos_ids[0]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with BOS in front if so asked."""
        ids = self.tokenizer.encode(text)
        return [self.prefix_id, *ids] if self.add_bos and ids[:1] != [self.prefix_id] else ids

    def pair(self, context: str, continuation: str) -> Pair:
        """Token ids of both, the context cut on the left to what the model reads.

        Raises:
          InputError: a continuation of no token, or of more than the model reads.
        """
        stripped = context.rstrip()
        continuation, context = context[len(stripped) :] + continuation, stripped
        if context:
            before = self.encode(context)
            after = self.encode(context + continuation)[len(before) :]
        else:
            before, after = [self.prefix_id], self.tokenizer.encode(continuation)
            if after[:1] == before:
                after = after[1:]
        if not after:
            raise InputError(f"{continuation[:60]!r} is no token of its own after its context")
        room = self.max_tokens + 1 - len(after)
        if room < 1:
            raise InputError(
                f"a continuation of {len(after)} tokens is longer than the {self.max_tokens} that "
                "the model reads"
            )
        return before[-room:], after

    def windows(self, text: str) -> list[Pair]:
        """Disjoint windows that score every token of a text once.

        Each is as long as the model reads, behind one token of context; the last one takes as much
        context as fits.
        """
        ids, size = self.tokenizer.encode(text), self.max_tokens
        if not ids:
            raise InputError("a text without tokens has no likelihood")
        pairs: list[Pair] = [([self.prefix_id], ids[:size])]
        for start in range(size, len(ids), size):
            end = min(start + size, len(ids))
            pairs.append((ids[max(0, end - size - 1) : start], ids[start:end]))
        return pairs
