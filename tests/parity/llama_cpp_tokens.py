"""Compares token ids with llama.cpp, for a trained vocabulary and every known way of cutting text.

    pip install xllamacpp
    python -m tests.parity.llama_cpp_tokens [NAME ...]

NAME is a key of `moejax.io.gguf_tokenizer.PRE_TOKENIZERS`. Exit code 1 where an id differs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

from moejax.core import tree
from moejax.io.gguf_tokenizer import PRE_TOKENIZERS
from moejax.io.load import Loaded, save_any
from moejax.io.tokenizer import Tokenizer
from moejax.models.config import ModelConfig
from moejax.models.params import abstract_params
from tests.parity.make_gguf_goldens import ask, serve

ROOT = Path(__file__).parents[2]
FILES = ("README.md", "BUILD.md", "moejax/io/gguf.py", "moejax/ops/rope.py")
SCRIPTS = (
    "漢字仮名交じり文 한국어 텍스트 Ünïcödé ÀÉ русский текст ελληνικά ",
    "12 345 6789 1000000 ",
    "!!! ... ?? -- == ;; \u201cquoted\u201d \u2018x\u2019 ",
)
TEXTS = (
    "Hello  world's 12345 x1y22\n\n  \tdef f(a, b):\r\n漢字 ünï 'LL _a-b",
    "  leading and   trailing   ",
    "tabs\t\tand\n\n\nlines \n x",
    "русский 12 текст, ελληνικά! 한국어",
    "a$b+c=d^e `code` ~x |y| <z>",
    "\u201cquotes\u201d \u2014 dash \u2026 \uff01\uff1f\uff1a\uff1b\u3002\u3001",
    "ªº ⅷ ½ ²",
    "don't DON'T we'Ll I'VE",
    "x\u00a0y\u3000z",
    "0123 456.789e-10",
)


def trained(name: str, corpus: list[str]) -> Tokenizer:
    """A byte-level BPE of 1,600 tokens that cuts text so."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = PRE_TOKENIZERS[name]()
    backend.decoder = decoders.ByteLevel()
    alphabet = ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1600,
        special_tokens=["<|end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return Tokenizer(backend, {"eos_token": "<|end|>"}, (0,))


def main() -> None:
    """Prints a line for each name."""
    corpus = [(ROOT / name).read_text() for name in FILES]
    texts = (*TEXTS, *(text[:1500] for text in corpus))
    corpus += [text * 30 for text in SCRIPTS]
    wrong = 0
    for name in sys.argv[1:] or PRE_TOKENIZERS:
        tokenizer = trained(name, corpus)
        config = ModelConfig("llama", tokenizer.vocab_size, 1, 32, 32, 2, 2, 16, max_position=64)
        params = tree.map_with_path(
            lambda _, leaf: np.zeros(leaf.shape, leaf.dtype), abstract_params(config)
        )
        with tempfile.TemporaryDirectory() as folder:
            save_any(Loaded(params, config, tokenizer), Path(folder) / "m.gguf", "gguf")
            server = serve(Path(folder) / "m.gguf")
            asked = [{"content": text, "add_special": False} for text in texts]
            found = [ask(server, "tokenize", one)["tokens"] for one in asked]
        differ = [t for t, ids in zip(texts, found, strict=True) if ids != tokenizer.encode(t)]
        wrong += len(differ)
        print(f"{name:16} {len(texts) - len(differ)} of {len(texts)} equal", *differ, flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
