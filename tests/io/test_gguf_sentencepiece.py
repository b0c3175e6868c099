"""SentencePiece vocabularies in GGUF: the ids are those of SentencePiece's own way of merging."""

import io
import json

import gguf
import numpy as np
import pytest
from tokenizers.pre_tokenizers import Metaspace

from moejax.core.errors import InputError
from moejax.io.gguf import read_metadata
from moejax.io.gguf_tokenizer import gguf_from_backend
from moejax.io.tokenizer import Tokenizer, load_tokenizer

TEXTS = (
    "the cat sat on the hat",
    "a  b   c    d",
    "tabs\tand\nlines\n\n12 345",
    "unseen: 漢字 ü \N{GRINNING FACE}",
    "<s>[INST] hi [/INST]</s>",
    "hat<sep>the cat",
    "▁ literal",
    "",
)
LEADING = ("  two before", " one", "\n line", "<s> after")
BYTES = [f"<0x{i:02X}>" for i in range(256)]
WORDS = ("▁t", "th", "▁th", "he", "▁the", "at", "▁c", "▁cat", "hat", "▁hat", "▁▁", "▁▁▁", "on")


def fields_by_hand(prefix: bool = True, **changes):
    """llama.cpp's fields: scores fall in the order in which the merges were learned."""
    chars = list("▁abcdehinosty0123")
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "<sep>", "\n\n", *WORDS, *chars]
    types = [2, 3, 3] + [6] * 256 + [4, 4] + [1] * (len(WORDS) + len(chars))
    scores = [0.0] * 261 + [-float(i) for i in range(len(WORDS) + len(chars))]
    fields = {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    fields |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in fields.items() if value is not None}


def merged(text: str, fields) -> list[int]:
    """Ids of a text without special tokens, by the definition: best score first, then leftmost."""
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    index = {token: i for i, token in enumerate(tokens)}
    prefix = fields["tokenizer.ggml.add_space_prefix"]
    parts = list(f"{' ' if prefix and text else ''}{text}".replace(" ", "▁"))
    while True:
        found = [
            (-scores[index[parts[i] + parts[i + 1]]], i)
            for i in range(len(parts) - 1)
            if parts[i] + parts[i + 1] in index
        ]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = []
    for part in parts:
        ids += [index[part]] if part in index else [index[f"<0x{b:02X}>"] for b in part.encode()]
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_those_of_the_definition(prefix):
    fields = fields_by_hand(prefix)
    tokenizer = Tokenizer.from_gguf_metadata(fields)
    for text in (*TEXTS[:4], *LEADING[:3], "thhe ▁cathat cccat", ""):
        if "\n\n" not in text:
            assert tokenizer.encode(text) == merged(text, fields), text
            assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " "), text


def test_special_tokens_are_whole_and_bos_is_added_unless_denied():
    tokenizer = Tokenizer.from_gguf_metadata(fields_by_hand())
    index = tokenizer.backend.token_to_id
    the, cat = index("▁the"), index("▁cat")
    assert tokenizer.encode("the cat", add_special=True) == [1, the, cat]
    # The space goes before what follows a special token, too.
    assert tokenizer.encode("the<sep>cat</s>") == [the, index("<sep>"), cat, 2]
    assert tokenizer.encode("the\n\ncat")[1] == index("\n\n")
    assert tokenizer.add_bos and tokenizer.eos_ids == (2,)
    denied = Tokenizer.from_gguf_metadata(fields_by_hand(add_bos_token=False, add_eos_token=True))
    assert denied.encode("the cat", add_special=True) == [the, cat, 2] and not denied.add_bos


@pytest.mark.parametrize("prefix", [True, False])
def test_out_and_in_is_the_same_tokenizer(prefix, tmp_path):
    first = Tokenizer.from_gguf_metadata(fields_by_hand(prefix))
    first.save(tmp_path)
    fields = gguf_from_backend(Tokenizer.from_folder(tmp_path), first.vocab_size + 3)
    given = fields_by_hand(prefix)
    size = first.vocab_size
    for key in ("tokens", "token_type"):
        assert fields[f"tokenizer.ggml.{key}"][:size] == given[f"tokenizer.ggml.{key}"]
    assert fields["tokenizer.ggml.token_type"][size:] == [5, 5, 5]
    assert fields["tokenizer.ggml.add_space_prefix"] is prefix
    assert fields["tokenizer.ggml.add_bos_token"] is True
    again = Tokenizer.from_gguf_metadata(given | fields)
    for text in (*TEXTS, *LEADING):
        assert again.encode(text, add_special=True) == first.encode(text, add_special=True), text


def test_spaces_that_llama_cpp_wrote_as_spaces():
    """Gemma's tokens of several spaces are the user's own: llama.cpp's converter spells them so."""
    plain = fields_by_hand(False)
    tokens, types = plain["tokenizer.ggml.tokens"], plain["tokenizer.ggml.token_type"]
    scores = list(plain["tokenizer.ggml.scores"])
    for token, spelled in (("▁▁", "  "), ("▁▁▁", "   ")):
        i = tokens.index(token)
        tokens[i], types[i], scores[i] = spelled, 4, -1000.0
    tokenizer = Tokenizer.from_gguf_metadata(plain | {"tokenizer.ggml.scores": scores})
    index = tokenizer.backend.token_to_id
    assert tokenizer.encode("a   the") == [index("a"), index("▁▁▁"), index("th"), index("e")]
    fields = gguf_from_backend(tokenizer, tokenizer.vocab_size)
    assert fields["tokenizer.ggml.tokens"] == tokens
    assert fields["tokenizer.ggml.token_type"] == types


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"scores": [0.0] * 5}, "tokens have 5 scores and 291 types"),
        ({"scores": None}, "tokenizer.ggml.scores is missing"),
        ({"scores": [0.0] * 291}, "all pieces have the score 0.0"),
        ({"unknown_token_id": 291}, "unk_token has id 291, the vocabulary 291 tokens"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Tokenizer.from_gguf_metadata(fields_by_hand(**changes))


def test_merges_that_scores_cannot_say_are_refused(tmp_path):
    tokenizer = Tokenizer.from_gguf_metadata(fields_by_hand())
    tokenizer.save(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["model"]["merges"] = state["model"]["merges"][::-1][1:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="are not in the order of any scores"):
        gguf_from_backend(Tokenizer.from_folder(tmp_path), tokenizer.vocab_size)


@pytest.mark.parametrize("scheme", ["first", "always", None])
def test_llama_cpp_s_other_space_is_warned_of(scheme, tmp_path, caplog):
    """Metaspace leaves a text alone that begins with a space; llama.cpp puts another before it."""
    tokenizer = Tokenizer.from_gguf_metadata(fields_by_hand())
    if scheme is not None:
        tokenizer.backend.normalizer = None
        tokenizer.backend.pre_tokenizer = Metaspace(prepend_scheme=scheme, split=False)
    assert gguf_from_backend(tokenizer, tokenizer.vocab_size)["tokenizer.ggml.add_space_prefix"]
    assert ("ids of texts that begin with a space" in caplog.text) == (scheme is not None)
    assert ("after a special token" in caplog.text) == (scheme == "first")


CORPUS = [
    *("the cat sat on the hat and the rat ate that oat", "def f(a, b):  return a + b"),
    *("one two  three   four 1 2 34 567", "他 漢字 ünïcode", "tabs\tand more tabs\there"),
] * 20


def trained(prefix: bool, kind: str = "bpe", **changes):
    """A model of the sentencepiece package, its own trainer's."""
    import sentencepiece

    model = io.BytesIO()
    options = dict(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type=kind,
        vocab_size=360,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<sep>", "\n\n"] if prefix else ["\n\n", "▁▁", "▁▁▁", "▁▁▁▁"],
        control_symbols=["[INST]", "[/INST]"],
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(**options | changes)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def kind_of(model, i: int) -> int:
    kinds = ((model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6))
    found = [kind for is_it, kind in kinds if is_it(i)]
    own = model.id_to_piece(i) in ("<sep>", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁")
    return found[0] if found else 4 if own else 1


def write(path, model, prefix: bool) -> dict:
    """A file with that vocabulary, as llama.cpp's converter writes one, by the gguf package."""
    ids = range(model.vocab_size())
    writer = gguf.GGUFWriter(str(path), "llama" if prefix else "gemma2")
    kinds = [kind_of(model, i) for i in ids]
    pieces = [model.id_to_piece(i) for i in ids]
    spelled = [t.replace("▁", " ") if k == 4 else t for t, k in zip(pieces, kinds, strict=True)]
    writer.add_context_length(64)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(spelled)
    scores = [-1000.0 if k == 4 else model.get_score(i) for i, k in zip(ids, kinds, strict=True)]
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(prefix)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return read_metadata(path)


@pytest.mark.parity
@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_sentencepieces_own(prefix, tmp_path):
    model = trained(prefix)
    fields = write(tmp_path / "m.gguf", model, prefix)
    assert sum(kind == 1 for kind in fields["tokenizer.ggml.token_type"]) > 80
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    rng = np.random.default_rng(0)
    drawn = ["".join(rng.choice(list("the cat \t字ü1+"), 40)) for _ in range(20)]
    for text in (*CORPUS[:5], *drawn, *LEADING[:3], "a  b   c    d", "no\n", "\N{GRINNING FACE}"):
        assert tokenizer.encode(text) == model.encode(text), text
        assert tokenizer.decode(model.encode(text)) == model.decode(model.encode(text)), text


@pytest.mark.parity
@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_those_transformers_reads_from_the_file(prefix, tmp_path):
    """transformers 5 adds the space at the very beginning only, and not before another space.

    llama.cpp and the tokenizer.json released with Llama 2 add it to those, and after every special
    token; such texts are left out here.
    """
    from transformers import AutoTokenizer

    write(tmp_path / "m.gguf", trained(prefix), prefix)
    ours = load_tokenizer(tmp_path / "m.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in (*CORPUS[:5], *TEXTS[:5]):
        if not prefix or not ("\n\n" in text or "<s>" in text):
            assert ours.encode(text, add_special=True) == theirs.encode(text), text
    ours.save(tmp_path / "hf")
    saved = AutoTokenizer.from_pretrained(tmp_path / "hf")
    written = gguf_from_backend(load_tokenizer(tmp_path / "hf"), ours.vocab_size)
    again = Tokenizer.from_gguf_metadata(read_metadata(tmp_path / "m.gguf") | written)
    for text in (*CORPUS[:5], *TEXTS, *LEADING):
        expected = ours.encode(text, add_special=True)
        assert saved.encode(text) == expected == again.encode(text, add_special=True), text


@pytest.mark.parity
@pytest.mark.parametrize("prefix", [True, False])
def test_a_folder_with_tokenizer_model_only(prefix, tmp_path):
    """Its ids are SentencePiece's, and what is saved gives them in transformers, too."""
    from transformers import AutoTokenizer

    model = trained(prefix)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.serialized_model_proto())
    size = model.vocab_size()
    more = {str(size): {"content": "<|call|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": more}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.add_bos and tokenizer.special["unk_token"] == "<unk>"
    assert tokenizer.encode("<|call|>") == [size] and tokenizer.vocab_size == size + 1
    for text in (*CORPUS[:5], *LEADING[:3], "a  b   c    d", "no\n", "\N{GRINNING FACE}"):
        assert tokenizer.encode(text) == model.encode(text), text
        assert tokenizer.encode(text, add_special=True) == [1, *model.encode(text)], text
    tokenizer.save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.serialized_model_proto()
    (tmp_path / "out" / "tokenizer.model").unlink()
    again = load_tokenizer(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    (tmp_path / "out" / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (*CORPUS[:5], "<|call|> one"):
        assert again.encode(text) == tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text), text


@pytest.mark.parity
def test_models_of_another_kind_or_broken_are_one_line(tmp_path):
    path = tmp_path / "tokenizer.model"
    unigram = trained(True, "unigram", vocab_size=300)
    removing = trained(True, remove_extra_whitespaces=True)
    for words, content in (
        ("is of the kind unigram", unigram.serialized_model_proto()),
        ("removes spaces", removing.serialized_model_proto()),
        ("is broken or no SentencePiece model", trained(True).serialized_model_proto()[:-9]),
        ("has no pieces", b""),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=words) as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)
