"""Alignments of two tokenizers: nothing that a token sees may change with later text."""

from __future__ import annotations

import functools
import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from moejax.core.errors import InputError
from moejax.data.alignment import align, byte_ends, settled_pieces
from moejax.io.tokenizer import Tokenizer
from tests.tiny_tokenizer import gguf_fields

TEXT = "the capital of France is Paris, don't  say\n\n  x = 3.14; naïve café 日本語 🙂 end"
WORDS = TEXT.split(" ")


@functools.cache
def tokenizers() -> tuple[Tokenizer, Tokenizer]:
    """A byte-level BPE trained on the words above, and the one of the other tests."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    first = Tokenizer(backend, {}, (0,))
    return first, Tokenizer.from_gguf_metadata(gguf_fields())


def texts(number: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        "".join(
            rng.choice([" ", " ", "\n", "  ", ""]) + rng.choice(WORDS) for _ in range(12)
        ).strip()
        or "x"
        for _ in range(number)
    ]


@pytest.mark.parametrize("how", ["settled", "cut"])
@pytest.mark.parametrize("swapped", [False, True])
def test_later_text_changes_nothing_that_was_seen(how, swapped):
    target, source = tokenizers()[::-1] if swapped else tokenizers()
    compared = 0
    for text, other in zip(texts(25), texts(25, seed=1), strict=True):
        for cut in range(1, len(text), 5):
            changed = text[:cut] + other
            a, b = align(text, target, source, how), align(changed, target, source, how)
            for t, (x, y) in enumerate(zip(a.target_ids, b.target_ids, strict=False)):
                same = x == y and a.target_ends[t] == b.target_ends[t]
                if not same or a.target_ends[t] > len(text[:cut].encode()):
                    break
                assert a.limits[t] == b.limits[t]
                assert a.source_ids[: a.limits[t]] == b.source_ids[: b.limits[t]]
                compared += a.limits[t]
    assert compared > 2000


@pytest.mark.parametrize("how", ["settled", "cut"])
def test_source_tokens_in_sight_lie_within_the_bytes_read(how):
    target, source = tokenizers()
    for text in texts(20):
        found = align(text, target, source, how)
        for end, limit in zip(found.target_ends, found.limits, strict=True):
            seen = source.decode(found.source_ids[:limit])
            assert text.startswith(seen) and len(seen.encode()) <= end
        assert source.decode(found.source_ids) == text
        assert found.limits == sorted(found.limits)
        if how == "cut":
            assert found.limits[-1] == len(found.source_ids)


def test_one_tokenizer():
    target, _ = tokenizers()
    found = align("the capital of France", target, target, "same")
    assert found.source_ids == found.target_ids
    assert found.limits == list(range(1, len(found.target_ids) + 1))
    with pytest.raises(InputError, match="one tokenizer"):
        align("the", *tokenizers(), "same")


@pytest.mark.parametrize("how", ["settled", "cut"])
def test_prefix_mode_reads_the_prompt_alone(how):
    target, source = tokenizers()
    prompt, answer = "the capital of France is", " Paris, don't say"
    found = align(prompt + answer, target, source, how, prompt=len(prompt))
    assert source.decode(found.source_ids) == prompt
    after = [n for n, end in zip(found.limits, found.target_ends, strict=True) if end >= 24]
    assert set(after) == {len(found.source_ids)}
    same = align(prompt + answer, target, target, "same", prompt=len(prompt))
    assert max(same.limits) == len(same.source_ids)


def test_tokens_that_share_a_character_complete_it_with_the_last():
    assert byte_ends("aé", [(0, 1), (1, 2), (1, 2)]) == [1, 1, 3]
    assert byte_ends("ab", [(0, 0), (0, 2)]) == [0, 2]  # a BOS stands for no text
    assert settled_pieces("a b\n  c  d e") == ["a", " b\n  c", "  d", " e"]
    assert "".join(settled_pieces("  x \n")) == "  x \n"


def test_what_cannot_be_aligned():
    with pytest.raises(InputError, match="settled, cut, same"):
        align("x", *tokenizers(), "bytes")
    with pytest.raises(InputError, match="empty"):
        align("", *tokenizers())
