"""The tokenizer: inverse pairs, files on disk, the chat template and its loss mask, bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core.errors import InputError
from moejax.io.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_tokenizer import CHATML, gguf_fields, smollm2_gguf

TINY = Tokenizer.from_gguf_metadata(gguf_fields())
PLAIN = Tokenizer.from_gguf_metadata(gguf_fields(chat_template=None))
PIECES = ["hello", " ", "\n", "12", "a", "é", "😀", "<|im_end|>", "<think>", "\t", "ab", "  "]
TEXT = st.one_of(st.text(max_size=20), st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
# What a conversation may contain without imitating the template's own marks.
CONTENT = TEXT.map(lambda text: text.replace("<|im_end|>", "").replace("<think>", ""))


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(smollm2_gguf())


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@given(TEXT)
def test_decode_is_the_inverse_of_encode(text):
    assert TINY.decode(TINY.encode(text), skip_special=False) == text


def test_smollm2_round_trip_and_ids(smollm2):
    text = "def f(x):\n\treturn  [1, 23]  # ünï 漢字 😀\r\n\n\n    'it's'\n"
    assert smollm2.decode(smollm2.encode(text), skip_special=False) == text
    assert (smollm2.vocab_size, smollm2.eos_ids, smollm2.pad_id) == (49152, (2,), 2)
    assert smollm2.encode("<|im_start|>") == [1] == [smollm2.bos_id]
    # Digits are cut off one by one before words are: the two spaces stay one token.
    assert [smollm2.id_to_text(i) for i in smollm2.encode("a  12")] == ["a", "  ", "1", "2"]


def test_digits_are_single_whatever_the_merges_say():
    assert len(TINY.encode("12")) == 2
    gpt2 = Tokenizer.from_gguf_metadata(gguf_fields(pre="gpt-2"))
    assert len(gpt2.encode("12")) == 1


def test_bos_is_added_where_the_file_asks_for_it():
    with_bos = Tokenizer.from_gguf_metadata(gguf_fields(add_bos_token=True))
    assert with_bos.encode("ab", add_special=True) == [1, *TINY.encode("ab")]
    assert with_bos.encode("ab") == TINY.encode("ab", add_special=True) == TINY.encode("ab")


def test_saved_and_read_again_is_the_same(tmp_path):
    TINY.save(tmp_path / "a")
    again = Tokenizer.from_folder(tmp_path / "a")
    for name in ("special", "eos_ids", "chat_template", "add_bos", "model_max_length"):
        assert getattr(again, name) == getattr(TINY, name), name
    turn = [user("  12 hello\n\n"), assistant("é <think>")]
    assert again.encode_chat(turn) == TINY.encode_chat(turn)
    again.save(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


def test_smollm2_default_system_prompt(smollm2):
    assert smollm2.apply_chat([user("Hi")], add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@settings(deadline=None)
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4), st.booleans())
def test_mask_covers_every_answer_with_its_end_and_nothing_else(turns, with_system):
    messages = [{"role": "system", "content": "hello"}] if with_system else []
    for question, answer in turns:
        messages += [user(question), assistant(answer)]
    ids, mask = TINY.encode_chat(messages)
    assert ids == TINY.encode(TINY.apply_chat(messages))
    counted = [i for i, m in zip(ids, mask, strict=True) if m]
    # A newline that an answer begins with may have merged with the template's own before it.
    spoken = TINY.decode(counted, skip_special=False).split("<|im_end|>")
    assert spoken[-1] == ""
    for (_, answer), text in zip(turns, spoken[:-1], strict=True):
        assert answer.endswith(text) and not answer.removesuffix(text).strip("\n")
    assert counted.count(2) == len(turns)


def test_prompt_is_a_prefix_of_the_whole(smollm2):
    turn = [user("What is 2 + 2?"), assistant("It is 4.")]
    ids, mask = smollm2.encode_chat(turn)
    prompt = smollm2.encode_prompt(turn[:1])
    assert ids[: len(prompt)] == prompt
    assert mask.index(True) == len(prompt)
    assert np.flatnonzero(np.diff(np.array(mask, int))).tolist() == [len(prompt) - 1, len(ids) - 2]


def test_plain_form_without_a_template():
    text = PLAIN.apply_chat([user("2 + 2?")], add_generation_prompt=True)
    assert text == "### Instruction:\n2 + 2?\n\n### Response:\n"
    ids, mask = PLAIN.encode_chat([user("2 + 2?"), assistant("4")])
    assert PLAIN.decode([i for i, m in zip(ids, mask, strict=True) if m], False) == "4<|im_end|>"
    with_bos = Tokenizer.from_gguf_metadata(gguf_fields(chat_template=None, add_bos_token=True))
    assert with_bos.apply_chat([user("a")]).startswith("<|im_start|>### Instruction")


def with_template(template: str, **changes) -> Tokenizer:
    return Tokenizer.from_gguf_metadata(gguf_fields(chat_template=template, **changes))


def test_the_answer_ends_with_the_last_token_the_template_writes_for_it():
    """The form of DeepSeek-Coder's template: text and a newline before the end-of-turn token."""
    tokenizer = with_template(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '### Response:\n' + m.content + '\n<|im_end|>\n' }}"
        "{% else %}{{ '### Instruction:\n' + m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:' }}{% endif %}"
    )
    ids, mask = tokenizer.encode_chat([user("a"), assistant("b"), user("c"), assistant("d")])
    counted = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(counted, False) == "\nb\n<|im_end|>\nd\n<|im_end|>"


def test_control_tokens_outside_the_byte_alphabet_keep_their_ids():
    fields = gguf_fields()
    tokens = [*fields["tokenizer.ggml.tokens"], "<｜fim▁begin｜>"]
    types = [*fields["tokenizer.ggml.token_type"], 3]
    tokenizer = Tokenizer.from_gguf_metadata(gguf_fields(tokens=tokens, token_type=types))
    assert tokenizer.encode("a<｜fim▁begin｜>")[1:] == [len(tokens) - 1]
    assert tokenizer.vocab_size == len(tokens)


def test_templates_may_use_what_transformers_gives_them():
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% generation %}{{ {'é': '<b>'} | tojson }}{% endgeneration %}{{ bos_token }}"
        "{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    messages = [{"role": "system", "content": ""}, user("a")]
    assert with_template(template).apply_chat(messages) == '{"é": "<b>"}<|im_start|>4'


def test_the_token_that_ends_a_turn_stops_generation_too():
    assert with_template(CHATML, eos_token_id=0).eos_ids == (0, 2)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no end-of-turn token"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            "rewrites earlier text",
        ),
        ("{{ raise_exception('no system role') }}", "refuses these messages: no system role"),
        ("{{ messages.clear() }}", "refuses these messages"),
        ("{{ 1 // (messages | length - 2) }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}{{ ().__class__.__subclasses__() }}", "refuses these messages"),
    ],
)
def test_templates_that_cannot_be_trained_with(template, message):
    tokenizer = with_template(template)
    with pytest.raises(InputError, match=message) as error:
        tokenizer.encode_chat([user("a"), assistant("b")])
    assert "\n" not in str(error.value)


def test_template_syntax_error_names_its_line():
    with pytest.raises(InputError, match="syntax error in line 2"):
        with_template("a\n{% if %}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (["hi"], "message 0 is a str"),
        ([{"role": "user"}], "message 0: 'content' must be a string, not NoneType"),
        ([{"role": 3, "content": ""}], "'role' must be a string, not int"),
    ],
)
def test_messages_of_another_shape(messages, message):
    with pytest.raises(InputError, match=message):
        TINY.apply_chat(messages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "blorp"}, "pre-tokenizer 'blorp' is unknown, known are gpt-2, smollm"),
        ({"pre": None}, "pre-tokenizer None is unknown"),
        ({"model": "t5"}, "tokenizer model 't5' is not supported"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"merges": ["h q"]}, r"merge 0 \('h q'\) leads out of the vocabulary"),
        ({"merges": ["h"]}, "merge 0"),
        ({"tokens": ["a", "a"]}, "2 entries, 1 of them different"),
        ({"eos_token_id": 9999}, "eos_token has id 9999, the vocabulary"),
    ],
)
def test_bad_gguf_metadata(changes, message):
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.from_gguf_metadata(gguf_fields(**changes))
    assert "\n" not in str(error.value)


def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match="no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(InputError, match="no valid JSON"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read by tokenizers"):
        Tokenizer.from_folder(tmp_path)
    TINY.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nope>"}')
    with pytest.raises(InputError, match="eos_token '<nope>' is not in"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(InputError, match="is missing; name a model folder"):
        load_tokenizer(tmp_path / "nothing.gguf")


def test_folders_as_others_write_them(tmp_path):
    TINY.save(tmp_path)
    config = {
        "eos_token": {"content": "<|endoftext|>", "special": True},
        "model_max_length": 1e30,
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": TINY.chat_template},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_ids == (0, 7, 2)  # config, generation config, the template's turn end
    assert tokenizer.model_max_length is None
    assert tokenizer.chat_template == TINY.chat_template
    assert tokenizer.special["pad_token"] == "<|endoftext|>"  # from special_tokens_map.json
    (tmp_path / "chat_template.jinja").write_text("{{ 'beside' }}")
    assert Tokenizer.from_folder(tmp_path).apply_chat([]) == "beside"


def test_a_tokenizer_larger_than_the_model_is_refused():
    TINY.check_fits(TINY.vocab_size)
    with pytest.raises(InputError, match=f"ids up to {TINY.vocab_size - 1}, the model embeds only"):
        TINY.check_fits(TINY.vocab_size - 1)


def test_that_a_text_begins_with_bos_outlives_a_folder(tmp_path):
    fields = gguf_fields()
    fields["tokenizer.ggml.add_bos_token"] = True
    fields.setdefault("tokenizer.ggml.bos_token_id", 0)
    tokenizer = Tokenizer.from_gguf_metadata(fields)
    assert tokenizer.add_bos
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.add_bos
    assert again.encode("ab", add_special=True) == tokenizer.encode("ab", add_special=True)
