"""A tokenizer from the metadata of a GGUF file, and back.

Vocabularies of SentencePiece are in `gguf_sentencepiece`. Of a byte-level BPE a GGUF file holds the
vocabulary, the merges and the kind of every token, but not how text is cut before merging: that is
one word, `tokenizer.ggml.pre`, whose meaning llama.cpp keeps in code (src/llama-vocab.cpp) and the
original models keep in their tokenizer.json. PRE_TOKENIZERS says the latter, so that ids equal the
original's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from moejax.core.errors import InputError
from moejax.io.gguf_sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    backend_from_pieces,
    is_sentencepiece,
    pieces_of,
    spelled,
)

_ROLES = (
    ("bos_token", "bos"),
    ("eos_token", "eos"),
    ("unk_token", "unknown"),
    ("pad_token", "padding"),
)

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace("{1,3}", "")
# The letters with case that DeepSeek-V2's tokenizer.json spells out: code points, hexadecimal.
_CASED_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 "
    "388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA "
    "1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 "
    "1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB "
    "1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D "
    "212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 "
    "A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A "
    "FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943 "
)
_CASED = "".join(
    "-".join(chr(int(end, 16)) for end in ends.split("-")) for ends in _CASED_LETTERS.split()
)
_DEEPSEEK_CODER_WORDS = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")
_DEEPSEEK_WORDS = (
    *(r"[\r\n]", rf"\s?[{_CASED}]+"),
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    *(r"\s+$", _DEEPSEEK_CODER_WORDS[-1]),
)


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
    "deepseek-llm": lambda: _split(*_DEEPSEEK_WORDS, digits=True),
    "olmo": _gpt2,
}
# Whole words that are in the vocabulary are taken as they are, even if no merges lead to them.
_IGNORE_MERGES = ("llama-bpe",)


def backend_from_gguf(
    fields: Mapping[str, Any],
) -> tuple[Backend, dict[str, str], tuple[int, ...]]:
    """(backend, special tokens by role, ids that end a text or a turn) from GGUF metadata.

    InputError for another model than byte-level BPE ("gpt2") or SentencePiece BPE ("llama"), an
    unknown pre-tokenizer, missing keys, ids out of range, merges that lead out of the vocabulary.
    """
    kind = _required(fields, "model")
    if kind not in ("gpt2", "llama"):
        raise InputError(
            f"GGUF: tokenizer model {kind!r} is not supported, only 'gpt2' (byte-level BPE) and "
            "'llama' (SentencePiece BPE) are; load the model from its Hugging Face folder"
        )
    tokens = list(_required(fields, "tokens"))
    tokens = spelled(tokens) if kind == "llama" else tokens
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise InputError(
            f"GGUF: tokenizer.ggml.tokens has {len(tokens)} entries, {len(vocab)} of them "
            "different; the file is damaged, download it again"
        )
    special = _special_tokens(fields, tokens)
    make = _byte_level_backend if kind == "gpt2" else _sentencepiece_backend
    backend = make(fields, vocab)
    _add_tokens(backend, tokens, fields.get("tokenizer.ggml.token_type") or ())
    bos, eos = (
        special.get(f"{role}_token") if adds(fields, role) else None for role in ("bos", "eos")
    )
    if bos or eos:
        backend.post_processor = _template(bos, eos, vocab)
    elif kind == "gpt2":
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    ends = (fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return backend, special, tuple(dict.fromkeys(int(i) for i in ends if i is not None))


def adds(fields: Mapping[str, Any], role: str) -> bool:
    """Whether the token "bos" or "eos" goes around a text; llama.cpp's default where unsaid."""
    unsaid = role == "bos" and fields.get("tokenizer.ggml.model") == "llama"
    return bool(fields.get(f"tokenizer.ggml.add_{role}_token", unsaid))


def _template(bos: str | None, eos: str | None, vocab: Mapping[str, int]):
    def around(text: str) -> list[str]:
        return [part for part in (bos, text, eos) if part]

    used = [(token, vocab[token]) for token in dict.fromkeys((bos, eos)) if token]
    return processors.TemplateProcessing(
        single=around("$A"), pair=[*around("$A"), *around("$B")], special_tokens=used
    )


def _byte_level_backend(fields: Mapping[str, Any], vocab: dict[str, int]) -> Backend:
    pre = _known_pre_tokenizer(fields)
    merges = _merges(_required(fields, "merges"), vocab)
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _IGNORE_MERGES)
    backend = Backend(model)
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_backend(fields: Mapping[str, Any], vocab: dict[str, int]) -> Backend:
    merges = fields.get("tokenizer.ggml.merges")
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    return backend_from_pieces(
        list(vocab),
        _required(fields, "scores"),
        _required(fields, "token_type"),
        unknown_id=unknown,
        space_prefix=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
        merges=None if merges is None else _merges(merges, vocab),
    )


def _known_pre_tokenizer(fields: Mapping[str, Any]) -> str:
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
    for kinds, special in (((CONTROL, UNKNOWN), True), ((USER_DEFINED,), False)):
        texts = [token for token, t in zip(tokens, types, strict=False) if t in kinds]
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
    """GGUF fields of a BPE tokenizer. Inverse: `backend_from_gguf`.

    Args:
      tokenizer: `moejax.io.tokenizer.Tokenizer`.
      vocab_size: of the model; ids that the tokenizer has not become unused tokens.

    InputError for another kind of tokenizer, and where its way of cutting text has no name.
    """
    backend = tokenizer.backend
    state = json.loads(backend.to_str())
    if state["model"]["type"] != "BPE":
        raise InputError(
            f"only BPE tokenizers are written to GGUF, this is {state['model']['type']}: take the "
            "tokenizer's files out of the source folder to write the weights alone"
        )
    of_pieces = is_sentencepiece(state)
    fields = (pieces_of if of_pieces else _byte_level_fields)(backend, state, vocab_size)
    for role, key in _ROLES:
        text = tokenizer.special.get(role)
        if text is not None and backend.token_to_id(text) is not None:
            fields[f"tokenizer.ggml.{key}_token_id"] = backend.token_to_id(text)
    ids = backend.encode("a").ids
    adds_bos = ids[0] == fields.get("tokenizer.ggml.bos_token_id")
    fields["tokenizer.ggml.add_bos_token"] = bool(tokenizer.add_bos or adds_bos)
    if ids[-1] == fields.get("tokenizer.ggml.eos_token_id"):
        fields["tokenizer.ggml.add_eos_token"] = True
    if tokenizer.chat_template is not None:
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    return fields


def _byte_level_fields(backend: Backend, state, vocab_size: int) -> dict[str, Any]:
    model = state["model"]
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    texts = {index: text for text, index in backend.get_vocab().items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    kinds = [
        (CONTROL if added[i]["special"] else USER_DEFINED)
        if i in added
        else (NORMAL if i in texts else UNUSED)
        for i in range(vocab_size)
    ]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer_of(backend),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
    }


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
