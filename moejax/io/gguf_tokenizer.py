"""A byte-level BPE tokenizer from the metadata of a GGUF file.

A GGUF file holds the vocabulary, the merges and the kind of every token, but not how text is cut
before merging: that is one word, `tokenizer.ggml.pre`, whose meaning llama.cpp keeps in code
(src/llama-vocab.cpp) and the original models keep in their tokenizer.json. PRE_TOKENIZERS says the
latter, so that ids equal the original's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from moejax.core.errors import InputError

_ROLES = (
    ("bos_token", "bos"),
    ("eos_token", "eos"),
    ("unk_token", "unknown"),
    ("pad_token", "padding"),
)
CONTROL, USER_DEFINED = 3, 4  # token types of the GGUF format

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace("{1,3}", "")
_DEEPSEEK_CODER_WORDS = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return _byte_level(use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _byte_level(use_regex=True)])


def _split(*patterns: str, digits: bool = False) -> pre_tokenizers.PreTokenizer:
    steps: list[Any] = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in patterns]
    if digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    return pre_tokenizers.Sequence([*steps, _byte_level(use_regex=False)])


PRE_TOKENIZERS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "llama-bpe": lambda: _split(_LLAMA3_WORDS),
    "qwen2": lambda: _split(_QWEN2_WORDS),
    "deepseek-coder": lambda: _split(*_DEEPSEEK_CODER_WORDS, digits=True),
}
# Whole words that are in the vocabulary are taken as they are, even if no merges lead to them.
_IGNORE_MERGES = ("llama-bpe",)


def backend_from_gguf(
    fields: Mapping[str, Any],
) -> tuple[Backend, dict[str, str], tuple[int, ...]]:
    """(backend, special tokens by role, ids that end a text or a turn) from GGUF metadata.

    InputError for another model than byte-level BPE, an unknown pre-tokenizer, missing keys, ids
    out of range and merges that lead out of the vocabulary.
    """
    pre = _known_pre_tokenizer(fields)
    tokens = list(_required(fields, "tokens"))
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise InputError(
            f"GGUF: tokenizer.ggml.tokens has {len(tokens)} entries, {len(vocab)} of them "
            "different; the file is damaged, download it again"
        )
    merges = _merges(_required(fields, "merges"), vocab)
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _IGNORE_MERGES)
    backend = Backend(model)
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, tokens, fields.get("tokenizer.ggml.token_type") or ())
    special = _special_tokens(fields, tokens)
    if fields.get("tokenizer.ggml.add_bos_token") and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, vocab[bos])]
        )
    else:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    ends = (fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return backend, special, tuple(dict.fromkeys(int(i) for i in ends if i is not None))


def _known_pre_tokenizer(fields: Mapping[str, Any]) -> str:
    kind = _required(fields, "model")
    if kind != "gpt2":
        raise InputError(
            f"GGUF: tokenizer model {kind!r} is not supported, only 'gpt2' (byte-level BPE) is; "
            "load the model from its Hugging Face folder"
        )
    pre = fields.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise InputError(
            f"GGUF: pre-tokenizer {pre!r} is unknown, known are {', '.join(PRE_TOKENIZERS)}; "
            "load the model from its Hugging Face folder"
        )
    return str(pre)


def _required(fields: Mapping[str, Any], key: str) -> Any:
    name = f"tokenizer.ggml.{key}"
    if name not in fields:
        raise InputError(f"GGUF: {name} is missing; give a file that holds a tokenizer")
    return fields[name]


def _merges(lines: Sequence[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for rank, line in enumerate(lines):
        left, separator, right = line.partition(" ")
        if not separator or left + right not in vocab or left not in vocab or right not in vocab:
            raise InputError(
                f"GGUF: merge {rank} ({line!r}) leads out of the vocabulary of {len(vocab)} "
                "tokens; the file is damaged, download it again"
            )
        merges.append((left, right))
    return merges


def _add_tokens(backend: Backend, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Mark control and user-defined tokens, which are matched whole before any cutting."""
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        texts = [token for token, t in zip(tokens, types, strict=False) if t == kind]
        added = [AddedToken(text, normalized=False, special=special) for text in texts]
        if special:
            backend.add_special_tokens(added)
        else:
            backend.add_tokens(added)


def _special_tokens(fields: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    special = {}
    for role, key in _ROLES:
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise InputError(
                f"GGUF: {role} has id {index}, the vocabulary {len(tokens)} tokens; the file is "
                "damaged, download it again"
            )
        special[role] = tokens[index]
    return special


# Text in which every known way of cutting differs where two of them differ at all.
_PROBE = "Hello  world's 12345 x1y22\n\n  \tdef f(a, b):\r\n漢字 ünï 'LL _a-b"


def gguf_from_backend(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """GGUF fields of a byte-level BPE tokenizer. Inverse: `backend_from_gguf`.

    Args:
      tokenizer: `moejax.io.tokenizer.Tokenizer`.
      vocab_size: of the model; ids that the tokenizer has not become unused tokens.

    InputError for another kind of tokenizer, and where its way of cutting text has no name.
    """
    state = json.loads(tokenizer.backend.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise InputError(
            "only byte-level BPE tokenizers are written to GGUF: take the tokenizer's files out "
            "of the source folder to write the weights alone"
        )
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    texts = {index: text for text, index in tokenizer.backend.get_vocab().items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    kinds = [
        (CONTROL if added[i]["special"] else USER_DEFINED) if i in added else 1 if i in texts else 5
        for i in range(vocab_size)
    ]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer_of(tokenizer.backend),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": bool(tokenizer.add_bos),
    }
    index_of = tokenizer.backend.token_to_id
    for role, key in _ROLES:
        if role in tokenizer.special and index_of(tokenizer.special[role]) is not None:
            fields[f"tokenizer.ggml.{key}_token_id"] = index_of(tokenizer.special[role])
    if tokenizer.chat_template is not None:
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    return fields


def _pre_tokenizer_of(backend: Backend) -> str:
    cut = backend.pre_tokenizer
    found = None if cut is None else cut.pre_tokenize_str(_PROBE)
    for name, make in PRE_TOKENIZERS.items():
        if make().pre_tokenize_str(_PROBE) == found:
            return name
    raise InputError(
        "this tokenizer cuts text in a way that has no name here among GGUF's "
        f"({', '.join(PRE_TOKENIZERS)}): take its files out of the source folder to write the "
        "weights alone"
    )
