"""A user's own task: every grader on a row of its kind, and what a bad file says."""

import json

import pytest

from moejax.core.errors import InputError
from moejax.evals.tasks import Grading, load_items
from moejax.evals.tasks.own import GRADERS

RUN = Grading(allow_code_execution=True)
CASES = {
    "number": ({"prompt": "2 + 2?", "answer": 4}, "It is 4.0.", "5"),
    "exact": ({"prompt": "Capital of France?", "answer": "Paris"}, "The answer is paris.", "Rome"),
    "python": (
        {"id": "x", "prompt": "def f(x):\n", "entry_point": "f",
         "test": "def check(candidate):\n    assert candidate(1) == 2\n"},
        "    return x + 1\n", "    return x\n",
    ),
    "calls": (
        {"id": "x", "name": "f", "signature": "f(x)", "description": "adds 1",
         "tests": [{"args": [1], "expected": 2}]},
        "def f(x): return x + 1", "def f(x): return x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_graders(tmp_path, name):
    row, right, wrong = CASES[name]
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(row) + "\n")
    task = GRADERS[name]
    (item,) = load_items(task, str(path))
    form = task.form(None)
    assert task.forms[form](item).stop is not None
    pairs = [(item, task.extract(item, form, text)) for text in (right, wrong)]
    assert [judged.verdict for judged in task.grade(pairs, RUN)] == ["pass", "wrong"]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("number", {"prompt": "?"}, "'answer' missing"),
        ("number", {"prompt": "?", "answer": "none"}, "'answer' holds no number"),
        ("exact", {"prompt": 3, "answer": "x"}, "'prompt' is int, not text"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, row, message):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        load_items(GRADERS[name], str(path))


def test_there_is_no_default_set():
    with pytest.raises(InputError, match="has no set of its own: give --data=FILE.jsonl"):
        load_items(GRADERS["exact"])
