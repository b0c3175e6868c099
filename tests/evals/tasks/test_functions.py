"""The shipped tasks are sound: every reference passes, every mutant and every shortcut fails."""

import json

import pytest

from moejax.core.errors import InputError
from moejax.evals import plain
from moejax.evals.tasks import Grading, load_items
from moejax.evals.tasks.functions import FUNCTIONS

TASKS = load_items(FUNCTIONS)


def words(field: str) -> set[str]:
    grading = Grading(allow_code_execution=True, num_workers=4)
    return {g.verdict for g in FUNCTIONS.grade([(t, t.row[field]) for t in TASKS], grading)}


def test_there_are_about_thirty_with_five_tests_each():
    assert 28 <= len(TASKS) <= 40
    assert all(len(task.row["tests"]) >= 5 for task in TASKS)
    assert len({task.row["name"] for task in TASKS}) == len(TASKS)


def test_every_reference_solution_passes():
    assert words("solution") == {"pass"}


def test_every_mutant_fails():
    assert words("mutant") == {"wrong"}


def test_no_task_is_passed_by_a_constant_or_by_its_first_argument():
    for task in TASKS:
        for constant in (None, 0, 1, True, False, [], ""):
            assert not all(plain.equal(constant, t["expected"]) for t in task.row["tests"]), task.id
        assert not all(plain.equal(t["args"][0], t["expected"]) for t in task.row["tests"]), task.id


def test_prompts_name_the_signature_and_say_what_is_wanted():
    for form in FUNCTIONS.forms.values():
        for task in TASKS:
            prompt = form(task)
            assert task.row["signature"] in prompt.message
            assert task.row["description"] in prompt.message
            assert task.row["solution"] not in prompt.message + prompt.prefix
    assert FUNCTIONS.forms["fence"](TASKS[0]).prefix == "```python\ndef add(a, b):\n"
    with pytest.raises(InputError, match="no prompt form 'haiku': choose from chat, fence"):
        FUNCTIONS.form("haiku")


LINE = {"id": "a", "name": "f", "signature": "f(x)", "description": "returns x"}
TESTS = {"tests": [{"args": [1], "expected": 1}]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", ":1: broken JSON"),
        (json.dumps(LINE), ":1: not a problem of functions: 'tests' missing"),
        (json.dumps({**LINE, **TESTS, "name": 3}), "'name' is int, not text"),
        (json.dumps({**LINE, "tests": []}), "0 tests"),
        (json.dumps({**LINE, "tests": [{"args": [1]}]}), "expected"),
        (json.dumps([1]), "an object is needed, got list"),
        ("\n".join([json.dumps({**LINE, **TESTS})] * 2), "more than once, as 'a'"),
    ],
)
def test_a_bad_task_file_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "tasks.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        load_items(FUNCTIONS, str(path))
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_a_missing_task_file_is_named():
    with pytest.raises(InputError, match="/no/such does not exist"):
        load_items(FUNCTIONS, "/no/such")


def test_a_task_file_is_read_in_order(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({**LINE, **TESTS, "id": i}) + "\n" for i in "bac"))
    assert [task.id for task in load_items(FUNCTIONS, str(path))] == ["b", "a", "c"]
