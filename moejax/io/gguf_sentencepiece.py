"""SentencePiece BPE vocabularies in GGUF (`tokenizer.ggml.model` "llama": Llama 2, Gemma 2, ...).

Such a file holds pieces with scores and no merges: of two neighbours whose union is a piece those
with the best score are merged first (Kudo and Richardson, arXiv 1808.06226; llama.cpp's
src/llama-vocab.cpp), and characters without a piece become bytes. Every split of a piece into two
pieces is therefore a merge, ranked by the piece's score.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from moejax.core.errors import InputError

# Types of tokens in the GGUF format.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_log = logging.getLogger(__name__)
_PROBE = "Hello  world's 12\n\tx"

Merge = tuple[str, str]


def spelled(tokens: Sequence[str]) -> list[str]:
    """Tokens as the vocabulary has them: llama.cpp writes those of spaces alone with spaces."""
    return [_SPACE * len(t) if t and not t.strip(" ") else t for t in tokens]


def backend_from_pieces(
    tokens: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    unknown_id: int,
    space_prefix: bool,
    merges: Sequence[Merge] | None = None,
) -> Backend:
    """A backend without special tokens. Inverse: `pieces_of`.

    Args:
      tokens, scores, types: one each per id; tokens as `spelled` gives them.
      unknown_id: of the token for characters that have neither a piece nor bytes.
      space_prefix: whether a space goes before every text and after every special token.
      merges: in the place of those that the scores imply.

    InputError for lists of different lengths and for scores that order nothing.
    """
    if not len(tokens) == len(scores) == len(types):
        raise InputError(
            f"GGUF: {len(tokens)} tokens have {len(scores)} scores and {len(types)} types: "
            "fetch the file again"
        )
    if merges is None:
        merges = implied_merges(tokens, scores, types)
        ranked = {scores[i] for i, kind in enumerate(types) if kind == NORMAL}
        if len(ranked) < 2 and merges:
            raise InputError(
                f"GGUF: all pieces have the score {ranked.pop() if ranked else 0}, so nothing says "
                "which to merge first: load the model from its Hugging Face folder"
            )
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=list(merges),
        unk_token=tokens[unknown_id],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    prefix = [normalizers.Prepend(_SPACE)] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", 1, 0)] if space_prefix else steps
    )
    return backend


def implied_merges(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[Merge]:
    """Every split of a piece into two pieces, in the order in which SentencePiece merges them.

    Tokens of the user's own come first: SentencePiece takes them whole before it merges anything
    (of a run of spaces longer than any token it takes the longest ones; this, as transformers, the
    shortest first). Control tokens and bytes are never the outcome of a merge.
    """
    usable = {t: i for i, t in enumerate(tokens) if types[i] in (NORMAL, USER_DEFINED, UNUSED)}
    ranked = []
    for piece, i in usable.items():
        rank = (0, float(i)) if types[i] == USER_DEFINED else (1, -scores[i])
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in usable and right in usable:
                ranked.append((rank, -cut, left, right))
    ranked.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in ranked]


def is_sentencepiece(state: Mapping[str, Any]) -> bool:
    """Whether a parsed tokenizer.json is such a vocabulary."""
    return state["model"]["type"] == "BPE" and bool(state["model"].get("byte_fallback"))


def pieces_of(backend: Backend, state: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """GGUF fields of such a tokenizer: tokens, scores, types, the space before a text.

    Args:
      state: the backend as tokenizer.json has it.
      vocab_size: of the model; ids that the tokenizer has not become unused tokens.

    InputError where llama.cpp would cut text otherwise: text is cut before merging, or the merges
    are not those that scores can say. Whether a text that begins with a space gets another one
    (Prepend) or not (Metaspace) has no place in GGUF; llama.cpp adds it, which is warned of.
    """
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    texts = {index: text for text, index in backend.get_vocab().items()}
    unknown = state["model"].get("unk_token")
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [_type(i, token, texts, added, unknown) for i, token in enumerate(tokens)]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in state["model"]["merges"]]
    order: dict[str, int] = {}
    for left, right in merges:
        order.setdefault(left + right, len(order))
    last = len(order)
    scores = [
        -float(order.get(token, last)) if kind in (NORMAL, USER_DEFINED) else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]
    _check_implied(merges, implied_merges(tokens, scores, types), order)
    spaced = [t.replace(_SPACE, " ") if not t.strip(_SPACE) else t for t in tokens]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [
            s if kind == USER_DEFINED else t
            for t, s, kind in zip(tokens, spaced, types, strict=True)
        ],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": _space_prefix(backend),
    }


def _type(i: int, token: str, texts, added, unknown: str | None) -> int:
    if i not in texts:
        return UNUSED
    if token == unknown:
        return UNKNOWN
    if i in added:
        return CONTROL if added[i]["special"] else USER_DEFINED
    return BYTE if _BYTE.fullmatch(token) else NORMAL


def _check_implied(merges: list, implied: list[Merge], order: Mapping[str, int]) -> None:
    reachable = {left + right for left, right in implied}
    kept = [merge for merge in merges if merge[0] + merge[1] in reachable]
    ranks = [order[left + right] for left, right in kept]
    strange = set(kept) ^ set(implied)
    if strange or ranks != sorted(ranks):
        left, right = min(strange) if strange else kept[0]
        raise InputError(
            f"GGUF keeps scores of pieces in place of merges, and {len(strange) or len(kept)} of "
            f"this tokenizer's {len(merges)} merges are not in the order of any scores (such as "
            f"{left!r} + {right!r}): take its files out of the source folder to write the weights "
            "alone"
        )


def _space_prefix(backend: Backend) -> bool:
    text = _PROBE if backend.normalizer is None else backend.normalizer.normalize_str(_PROBE)
    cut = backend.pre_tokenizer
    parts = [text] if cut is None else [part for part, _ in cut.pre_tokenize_str(text)]
    plain = _PROBE.replace(" ", _SPACE)
    if parts not in ([plain], [_SPACE + plain]):
        raise InputError(
            "this tokenizer cuts or changes text before merging, which GGUF cannot say of one with "
            f"pieces and bytes ({_PROBE!r} becomes {parts}): take its files out of the source "
            "folder to write the weights alone"
        )
    prefix = parts != [plain]
    if prefix:
        _warn_of_other_spaces(backend)
    return prefix


def _warn_of_other_spaces(backend: Backend) -> None:
    """llama.cpp puts a space before every text and after every special token, come what may."""
    where = []
    added = next(iter(backend.get_added_tokens_decoder().values()), None)
    doubled = backend.encode("  ", add_special_tokens=False).tokens
    if "".join(doubled).count(_SPACE) < 3:
        where.append("that begin with a space")
    if added is not None:
        behind = "".join(backend.encode(f"{added.content}0", add_special_tokens=False).tokens)
        if _SPACE not in behind.removeprefix(added.content):
            where.append("after a special token")
    if where:
        _log.warning(
            "ids of texts %s will differ: llama.cpp puts a space before them, which this tokenizer "
            "does not, and a GGUF file cannot say so",
            " or ".join(where),
        )
