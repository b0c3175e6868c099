"""Multiple choice and perplexity from log-likelihoods: published schemas, tokens, windows."""

import json
import math

import pytest

from moejax.core.errors import InputError
from moejax.evals.choice import choice_summary, judge_choices, judge_texts, text_summary
from moejax.evals.tasks.choice import CHOICE_TASKS, load_choices, with_shots
from moejax.evals.text_likelihood import Encoding
from moejax.io.tokenizer import Tokenizer
from moejax.serve.likelihood import Likelihood
from tests.tiny_tokenizer import gguf_fields

ROWS = {
    "piqa": {"goal": "Boil eggs.", "sol1": "Use water.", "sol2": "Use sand.", "label": 0},
    "copa": {"premise": "He fell.", "question": "cause", "choice1": "He slept.",
             "choice2": "It was icy.", "label": 1},
    "openbookqa": {"question_stem": "The sun is", "answerKey": "B",
                   "choices": {"text": ["cold", "hot"], "label": ["A", "B"]}},
    "winogrande": {"sentence": "Ann saw Bea and _ waved.", "option1": "Ann", "option2": "Bea",
                   "answer": "2"},
    "rte": {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0},
    "hellaswag": {"activity_label": "Cooking", "ctx_a": "He cooks.", "ctx_b": "he then",
                  "endings": ["eats [title] all.", "sleeps."], "label": "1"},
    "arc_easy": {"question": "What burns?", "answerKey": "2",
                 "choices": {"text": ["ice", "wood"], "label": ["1", "2"]}},
    "arc_challenge": {"query": "Question: What burns?\n", "choices": ["ice", "wood"], "gold": 1},
    "choice": {"query": "1 + 1 =", "choices": ["2", "3"], "gold": 0},
}  # fmt: skip
CONTEXTS = {
    "piqa": "Question: Boil eggs.\nAnswer:", "copa": "He fell because",
    "openbookqa": "The sun is", "winogrande": "Ann saw Bea and Bea",
    "rte": "It rains.\nQuestion: It is wet. True or False?\nAnswer:",
    "hellaswag": "Cooking: He cooks. He then", "arc_easy": "Question: What burns?\nAnswer:",
    "arc_challenge": "Question: What burns?\nAnswer:", "choice": "1 + 1 =",
}  # fmt: skip
GOLD = {
    "piqa": "Use water.", "copa": "it was icy.", "openbookqa": "hot", "winogrande": "waved.",
    "rte": "True", "hellaswag": "sleeps.", "arc_easy": "wood", "arc_challenge": "wood",
    "choice": "2",
}  # fmt: skip


@pytest.fixture(scope="module")
def encoding():
    return Encoding(Tokenizer.from_gguf_metadata(gguf_fields()), 8)


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", CHOICE_TASKS)
def test_every_published_schema_is_read(tmp_path, name):
    (item,) = load_choices(CHOICE_TASKS[name], write(tmp_path / "rows.jsonl", ROWS[name]))
    assert item.contexts[item.gold] == CONTEXTS[name]
    assert item.continuations[item.gold] == GOLD[name]
    assert item.solved() == f"{CONTEXTS[name]} {GOLD[name]}"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "x", "choices": ["a", "b"]}, "not a question of choice: 'gold' is missing"),
        ({"query": "x", "choices": ["a", "b"], "gold": 2}, "the right choice is number 2 of 2"),
        ({"query": "x", "choices": ["a"], "gold": 0}, "at least 2 choices"),
        ({"query": "x", "choices": ["a", ""], "gold": 0}, "a choice is empty"),
        ({"query": "x", "choices": 3, "gold": 0}, "not a question of choice"),
        ([1], "not a question of choice"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(InputError, match=message) as raised:
        load_choices(CHOICE_TASKS["choice"], path)
    assert "rows.jsonl:1" in str(raised.value) or "[1]" not in str(row)


def test_shots_are_other_questions_solved(tmp_path):
    rows = [{"query": f"{i} + 1 =", "choices": [str(i + 1), "no"], "gold": 0} for i in range(5)]
    items = load_choices(CHOICE_TASKS["choice"], write(tmp_path / "rows.jsonl", *rows))
    shown = with_shots(items, items, 2, seed=3)
    for item, plain in zip(shown, items, strict=True):
        assert item.contexts[0].endswith("\n\n" + plain.contexts[0])
        assert item.contexts[0].count("+ 1 =") == 3
        assert item.contexts[0].count(plain.contexts[0]) == 1
    with pytest.raises(InputError, match="--shots=5 needs more than 5"):
        with_shots(items, items, 5, seed=3)


def test_spaces_belong_to_the_continuation_and_tokens_join(encoding):
    encode = encoding.tokenizer.encode
    before, after = encoding.pair("hello ", "ab")
    assert before == encode("hello") and before + after == encode("hello ab")
    alone = encoding.pair("", "ab")
    assert alone == ([encoding.prefix_id], encode("ab"))
    long_before, long_after = encoding.pair("hello ab " * 9, "ab")
    assert len(long_before) + len(long_after) == encoding.max_tokens + 1
    with pytest.raises(InputError, match="is no token"):
        encoding.pair("hello", "")
    with pytest.raises(InputError, match="longer than the 8"):
        encoding.pair("hello", " ab" * 30)


def test_windows_score_every_token_once(encoding):
    text = "hello ab 12 hello ab 345 hello 6789 ab"
    ids, windows = encoding.tokenizer.encode(text), encoding.windows(text)
    assert [token for _, after in windows for token in after] == ids and len(windows) > 2
    whole, start = [encoding.prefix_id, *ids], 1
    for before, after in windows:
        assert whole[start - len(before) : start] == before
        assert len(before) + len(after) <= encoding.max_tokens + 1
        start += len(after)
    assert len(windows[-1][0]) > 1  # as much context as fits
    with pytest.raises(InputError, match="without tokens"):
        encoding.windows("")


def likely(value):
    return lambda pairs: [Likelihood(value(pair), False, ()) for pair in pairs]


def test_the_likeliest_choice_is_taken_plain_and_per_character(tmp_path, encoding):
    rows = [
        {"query": "a", "choices": ["ab", "ab ab ab ab"], "gold": 0},
        {"query": "b", "choices": ["ab", "ab ab ab ab"], "gold": 1},
    ]
    items = load_choices(CHOICE_TASKS["choice"], write(tmp_path / "rows.jsonl", *rows))
    # One nat and a half per token after three for the first: longer is worse, less so by length.
    records = judge_choices(items, encoding, likely(lambda pair: -3.0 - 0.5 * len(pair[1])))
    assert [record["passed"] for record in records] == [True, False]
    assert [record["passed_norm"] for record in records] == [False, True]
    assert all(record["margin"] > 0 for record in records)
    summary = choice_summary(records)
    assert (summary["acc"], summary["acc_norm"]) == (0.5, 0.5)
    assert json.loads(json.dumps(records)) == records


def test_what_an_earlier_run_scored_is_not_scored_again(tmp_path, encoding, monkeypatch):
    """As if the run had been killed after any chunk: the same records, in the same chunks."""
    monkeypatch.setattr("moejax.evals.choice.CHUNK_TOKENS", 16)
    rows = [{"query": "ab " * n, "choices": ["ab", "12 ab"], "gold": n % 2} for n in range(5)]
    items = load_choices(CHOICE_TASKS["choice"], write(tmp_path / "rows.jsonl", *rows))
    texts = [("a", "hello ab 12 hello ab 345"), ("b", "12"), ("c", "hello ab " * 9)]
    for judge, asked in ((judge_choices, items), (judge_texts, texts)):
        kept, calls = [], []

        def score(pairs, calls=calls):
            calls.append(pairs)
            return likely(lambda pair: -0.1 * sum(pair[0]) - len(pair[1]))(pairs)

        whole = judge(asked, encoding, score, on_records=kept.append)
        assert len(kept) == len(calls) > 2
        for stop in range(len(kept) + 1):
            before = [record for part in kept[:stop] for record in part]
            chunks = list(calls)
            calls.clear()
            again = []
            found = judge(asked, encoding, score, done=before, on_records=again.append)
            assert calls == chunks[stop:] and len(again) == len(kept)
            assert [timeless(r) for r in found] == [timeless(r) for r in whole]
            calls[:0] = chunks[:stop]
        calls.clear()
        assert judge(asked, encoding, score, done=whole) == whole and not calls


def timeless(record):
    return {name: value for name, value in record.items() if not name.endswith("_s")}


def test_perplexity_is_of_tokens_words_and_bytes(encoding):
    records = judge_texts([("a", "hello ab"), ("b", "12")], encoding, likely(lambda p: -len(p[1])))
    summary = text_summary(records)
    assert summary["token_perplexity"] == pytest.approx(math.e)
    assert summary["num_words"] == 3 and summary["num_bytes"] == 10
    nats = summary["num_tokens"]
    assert summary["word_perplexity"] == pytest.approx(math.exp(nats / 3))
    assert summary["bits_per_byte"] == pytest.approx(nats / 10 / math.log(2))
