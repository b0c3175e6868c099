"""Shared n-grams: counted exactly, whatever case and punctuation, and short problems whole."""

import random

import pytest

from moejax.core.errors import InputError
from moejax.evals.decontaminate import ngrams, overlaps, summary, texts_of, words


def test_shares_are_of_the_problems_ngrams():
    problem = "one two three four five six seven eight"
    found = overlaps({"b": {"p": problem}}, ["ZERO, one two; three four. five nine"], n=4)
    assert found == {"b": {"p": round(2 / 5, 6)}}
    assert overlaps({"b": {"p": problem}}, [problem.upper()], n=4) == {"b": {"p": 1.0}}
    assert overlaps({"b": {"p": problem}}, ["one two three", "four five six"], n=4) == {
        "b": {"p": 0.0}
    }


def test_short_problems_are_one_ngram_and_tiny_ones_none():
    short = {"b": {"short": "a b c d e f", "tiny": "a b c"}}
    assert overlaps(short, ["x a b c d e f y"], n=13) == {"b": {"short": 1.0, "tiny": 0.0}}
    assert overlaps(short, ["x a b c d e g y"], n=13) == {"b": {"short": 0.0, "tiny": 0.0}}


def test_equals_the_definition_on_random_texts():
    rng = random.Random(0)

    def text(size):
        return " ".join(rng.choice("abc") for _ in range(size))

    problems, training = {str(i): text(12) for i in range(20)}, [text(60) for _ in range(5)]
    seen = set().union(*(ngrams(t, 5, 1) for t in training))
    wanted = {k: round(len(ngrams(p, 5, 1) & seen) / len(ngrams(p, 5, 1)), 6)
              for k, p in problems.items()}  # fmt: skip
    assert overlaps({"b": problems}, training, n=5) == {"b": wanted}


def test_the_summary_counts_and_rows_give_all_their_texts():
    shares = {"a": 0.0, "b": 0.25, "c": 0.5, "d": 1.0}
    assert summary(shares) == {
        "num_problems": 4, "num_overlapping": 3, "num_half_or_more": 2, "mean_share": 0.4375
    }  # fmt: skip
    row = {"messages": [{"role": "user", "content": "hi"}], "n": 3, "text": "bye"}
    assert texts_of(row) == ["user", "hi", "bye"]
    assert words("It's 3.5\nX_y") == ["it", "s", "3", "5", "x_y"]
    with pytest.raises(InputError, match="must be 1 or more"):
        overlaps({}, [], n=0)
