"""Five domains that any Linux machine or the checkout's data has, as rows of tokens."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moejax.core.errors import InputError

PARTS = ("train", "validation", "test")
END = 0  # between documents


@dataclasses.dataclass(frozen=True)
class Domains:
    """rows: domain -> part -> int32 [rows, T], whole rows of documents put end to end."""

    rows: dict[str, dict[str, np.ndarray]]
    vocab_size: int

    def batch(self, rows_BT: np.ndarray) -> dict[str, np.ndarray]:
        """A batch for the loss: every token counts but the first, and documents see each other."""
        places = np.arange(rows_BT.shape[1], dtype=np.int32)
        return {
            "tokens": rows_BT,
            "segment_ids": np.ones_like(rows_BT),
            "positions": np.broadcast_to(places, rows_BT.shape),
            "loss_mask": np.ones(rows_BT.shape, np.float32),
        }

    def parts(self, domain: str, part: str, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """All rows of a part in batches; the last one is filled with padding."""
        whole = self.rows[domain][part]
        for start in range(0, len(whole), batch_size):
            rows = whole[start : start + batch_size]
            missing = ((0, batch_size - len(rows)), (0, 0))
            batch = self.batch(rows)
            yield {name: np.pad(array, missing) for name, array in batch.items()}


def load_domains(config: ConfigDict, folder: Path) -> Domains:
    """Reads, splits by document, and tokenises by a byte-level BPE made of the training part.

    The tokenizer is kept in `folder`. InputError for a domain with no document.
    """
    data = config.data
    sources: dict[str, Callable[[], Iterator[str]]] = {
        "python": _stdlib,
        "cpp": lambda: _cpp(Path(data.folder) / "mbxp_cpp.jsonl"),
        "gsm8k": lambda: _gsm8k(Path(data.folder) / "gsm8k_train.jsonl"),
        "wikitext": lambda: _wikitext(Path(data.folder)),
        "man": lambda: _man(Path(data.man), data.languages),
    }
    texts: dict[str, dict[str, list[str]]] = {}
    for name, read in sources.items():
        texts[name] = {part: [] for part in PARTS}
        size = 0
        for text in read():
            texts[name][_part(text)].append(text)
            size += len(text)
            if size >= data.max_chars and all(texts[name].values()):
                break
        if not all(texts[name].values()):
            raise InputError(f"domain {name} has no documents: data.folder and data.man name them")
    whole = (t for part in texts.values() for t in part["train"])
    tokenizer = trained_tokenizer(whole, data.vocab_size, folder / "tokenizer.json")
    rows = {
        name: {part: _rows(tokenizer, found, data.seq_len) for part, found in parts.items()}
        for name, parts in texts.items()
    }
    for name, parts in rows.items():
        for part in ("validation", "test"):
            parts[part] = parts[part][: data.heldout_rows]
            if not len(parts[part]):
                raise InputError(f"domain {name} has too little text to hold out for {part}")
    return Domains(rows, tokenizer.get_vocab_size())


def _part(text: str) -> str:
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "test" if value < 0.1 else "validation" if value < 0.2 else "train"


def _rows(tokenizer: Tokenizer, texts: list[str], seq_len: int) -> np.ndarray:
    ids: list[int] = []
    for found in tokenizer.encode_batch(texts):
        ids += [END, *found.ids]
    number = len(ids) // seq_len
    return np.array(ids[: number * seq_len], np.int32).reshape(number, seq_len)


def trained_tokenizer(texts: Iterable[str], size: int, path: Path) -> Tokenizer:
    """A byte-level BPE of so many ids made of the texts, kept at `path`."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def _stdlib() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py")) + sorted(root.glob("*/*.py")):
        if "site-packages" not in path.parts and "test" not in path.parts:
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                yield text[:20_000]


def _cpp(path: Path) -> Iterator[str]:
    for row in _json_lines(path):
        if row.get("canonical_solution"):
            yield row["prompt"] + row["canonical_solution"]


def _gsm8k(path: Path) -> Iterator[str]:
    for row in _json_lines(path):
        yield f"{row['question']}\n{row['answer']}\n"


def _wikitext(folder: Path) -> Iterator[str]:
    yield from (article for part in ("valid", "test") for article in wikitext(folder, part))


def wikitext(folder: Path, part: str) -> Iterator[str]:
    """The articles of one part of WikiText-2, as they are tokenised there."""
    text = _read(folder / f"wikitext2_{part}.tokens.txt")
    yield from (article for article in re.split(r"\n(?= = [^=])", text) if article.strip())


def _man(root: Path, languages: tuple[str, ...]) -> Iterator[str]:
    """Manual pages in several languages by turns, without troff's marks."""
    found = [sorted((root / language).glob("man*/*.gz")) for language in languages]
    for number in range(max(map(len, found), default=0)):
        for paths in found:
            if number < len(paths):
                raw = gzip.decompress(paths[number].read_bytes()).decode("utf-8", "ignore")
                text = re.sub(r"\\f.|\\[&%/|^]|^\.\\\".*$|^'\\\".*$", "", raw, flags=re.M)
                text = re.sub(r"^\.\w+ ?", "", text, flags=re.M).replace("\\-", "-")
                yield text


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in _read(path).splitlines() if line.strip())


def _read(path: Path) -> str:
    if not path.exists():
        raise InputError(f"{path} is missing: --config.data.folder names the folder of the data")
    return path.read_text(encoding="utf-8")
