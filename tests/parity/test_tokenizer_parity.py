"""Ids, decoded text and chat text equal those of transformers, live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from moejax.io.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_tokenizer import gguf_fields, smollm2_gguf

TEXTS = (
    "",
    "Hello world, it's fine; they'LL say we've won't.",
    "def f(x):\n    return [x ** 2 for x in range(10)]\n\n\n\tif x:\n\t\tpass  # 3.14\r\n",
    "a  12 b   345\n\n 6789\t0 x1y2",
    "ünï-çødé 漢字かな한국어 Ελληνικά عربى हिन्दी ½ ² ٣ Ⅷ",
    "😀👩‍👩‍👧 é zero​width nbsp",
    "<|im_start|>user\n<|im_end|> <|im_end|>x<repo_name><|endoftext|>",
    "   leading and trailing   ",
    "\n\n\n  \n",
    "hello hello12 ab\n\n    hello",
)
CHATS = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "  Hi\n"}, {"role": "assistant", "content": "\n\nYo  12\n"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "{{ c }}"},
    ],
)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(smollm2_gguf())


@pytest.fixture(scope="module")
def exported(smollm2: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What transformers makes of the folder we write."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("exported")
    smollm2.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_smollm2_ids_equal_transformers_own_reading_of_the_gguf(smollm2):
    from transformers import AutoTokenizer

    path = smollm2_gguf()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        if not any(c.isnumeric() for c in text):
            assert smollm2.encode(text) == theirs.encode(text, add_special_tokens=False), text
    # transformers 5.23 knows no pre-tokenizer "smollm" and falls back to GPT-2's, so whitespace
    # before a digit comes out otherwise; the model's own tokenizer.json cuts single digits first.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    for text in TEXTS:
        ids = smollm2.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert smollm2.decode(ids, skip_special=False) == theirs.decode(ids), text
        assert smollm2.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def test_exported_folder_gives_the_same_ids(smollm2, exported):
    for text in TEXTS:
        assert exported.encode(text, add_special_tokens=False) == smollm2.encode(text), text
        assert exported.encode(text) == smollm2.encode(text, add_special=True), text
    assert len(exported) == smollm2.vocab_size
    assert (exported.eos_token_id, exported.pad_token_id, exported.bos_token_id) == (2, 2, 1)
    assert exported.model_max_length == 8192


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("prompt", (False, True))
def test_chat_equals_apply_chat_template(smollm2, exported, messages, prompt):
    ours = smollm2.apply_chat(messages, add_generation_prompt=prompt)
    theirs = exported.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    assert ours == theirs
    ids = exported.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)
    assert ids["input_ids"] == smollm2.encode(ours)


def test_mask_equals_the_generation_blocks_of_transformers(smollm2, exported):
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [*CHATS[2][:3], {"role": "user", "content": "c 1"}, CHATS[2][2]]
    theirs = exported.apply_chat_template(
        messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = smollm2.encode_chat(messages)
    assert ids == theirs["input_ids"]
    assert [int(m) for m in mask] == theirs["assistant_masks"]


@pytest.mark.parametrize("pre", ("gpt-2", "llama-bpe", "qwen2"))
def test_other_pre_tokenizers_equal_transformers(pre, tmp_path: Path):
    from transformers.integrations.gguf import convert_gguf_tokenizer

    fields = gguf_fields(pre=pre)
    ours = Tokenizer.from_gguf_metadata(fields)
    keys = ("tokens", "token_type", "merges")
    named = {key: fields[f"tokenizer.ggml.{key}"] for key in keys}
    theirs, _ = convert_gguf_tokenizer(
        "llama", {**named, "tokenizer_type": "gpt2", "pre_tokenizer_type": pre}
    )
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
