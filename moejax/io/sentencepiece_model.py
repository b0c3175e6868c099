"""tokenizer.model, SentencePiece's own file, read without its library: it is a protobuf message.

Numbers of fields and their defaults are those of sentencepiece_model.proto
(github.com/google/sentencepiece, src/).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from moejax.core.errors import InputError
from moejax.io.gguf_tokenizer import backend_from_gguf

# ModelProto
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
# ModelProto.SentencePiece
_PIECE, _SCORE, _TYPE = 1, 2, 3
# TrainerSpec
_MODEL_TYPE, _SPACE_BEHIND = 3, 24
_IDS = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, -1)}
# NormalizerSpec
_CHARS_MAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE = 2, 3, 4, 5
_KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
_BPE = 2


def read_model(path: str | Path) -> dict[str, Any]:
    """The vocabulary as a GGUF file would say it (`moejax.io.gguf_tokenizer` reads that).

    InputError for a file that is broken, of another kind than BPE, or that changes text first.
    """
    try:
        top = list(_fields(Path(path).read_bytes()))
        pieces = [dict(_fields(value)) for number, value in top if number == _PIECES]
        trainer, rules = (
            dict(field for number, value in top if number == wanted for field in _fields(value))
            for wanted in (_TRAINER, _NORMALIZER)
        )
        tokens = [piece[_PIECE].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece.get(_SCORE, bytes(4)))[0] for piece in pieces]
    except (ValueError, KeyError, IndexError, struct.error, AttributeError, TypeError) as error:
        raise InputError(
            f"{path} is broken or no SentencePiece model ({type(error).__name__}): fetch it again"
        ) from error
    _check(path, tokens, trainer, rules)
    ids = {key: _signed(trainer.get(number, unsaid)) for key, (number, unsaid) in _IDS.items()}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [piece.get(_TYPE, 1) for piece in pieces],
        "tokenizer.ggml.add_space_prefix": bool(rules.get(_DUMMY_PREFIX, 1)),
        **{f"tokenizer.ggml.{key}_token_id": i for key, i in ids.items() if i >= 0},
    }


def backend_of_model(
    path: str | Path, config: Mapping[str, Any], added: Mapping[str, int]
) -> tuple[Backend, dict[str, str]]:
    """The backend of a tokenizer.model, and its special tokens by role.

    config: of tokenizer_config.json. added: of added_tokens.json, text -> id.
    """
    fields = read_model(path)
    for role, unsaid in (("bos", True), ("eos", False)):
        fields[f"tokenizer.ggml.add_{role}_token"] = config.get(f"add_{role}_token", unsaid)
    backend, special, _ = backend_from_gguf(fields)
    more: dict[int, Any] = {i: {"content": text} for text, i in added.items()}
    more |= {int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items()}
    for i, token in sorted(more.items()):
        text, is_special = token["content"], bool(token.get("special", False))
        if backend.token_to_id(text) is None:
            backend.add_tokens([AddedToken(text, normalized=False, special=is_special)])
        if backend.token_to_id(text) != i:
            raise InputError(
                f"{path}: the added token {text!r} should have id {i} and gets "
                f"{backend.token_to_id(text)}: the folder's files belong to different models"
            )
    return backend, special


def _check(path: str | Path, tokens: list[str], trainer: dict, rules: dict) -> None:
    kind = trainer.get(_MODEL_TYPE, 1)
    changes = {
        "maps characters": bool(rules.get(_CHARS_MAP)),
        "removes spaces": bool(rules.get(_REMOVE_SPACES, 1)),
        "keeps spaces as they are": not rules.get(_ESCAPE, 1),
        "puts spaces behind words": bool(trainer.get(_SPACE_BEHIND)),
    }
    does = [words for words, is_so in changes.items() if is_so]
    if tokens and kind == _BPE and not does:
        return
    what = f"is of the kind {_KINDS.get(kind, kind)}" if kind != _BPE else " and ".join(does)
    what = what if tokens else "has no pieces"
    raise InputError(
        f"{path} {what}: only BPE that leaves text as it is can be read; write "
        "a tokenizer.json with transformers: AutoTokenizer.from_pretrained(folder)"
        ".save_pretrained(folder)"
    )


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message: an integer, or the bytes of anything else."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(content, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(content):
            raise ValueError("ends early")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at


def _signed(value: int) -> int:
    """Negative numbers are stored as 64 bits."""
    return value - (1 << 64) if value >> 63 else value
