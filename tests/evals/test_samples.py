"""Samples on disk: what is written is read, what does not fit is named with its line."""

import json

import pytest

from moejax.core.errors import InputError
from moejax.evals.samples import append_samples, read_partial, read_samples, write_samples

TASKS = ["a", "b"]
A, B = {"id": "a", "completion": "x"}, {"id": "b", "completion": "é\n\ud800"}


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_what_is_written_is_read(tmp_path):
    records = [{**A, "sample": 0, "passed": True}, {**B, "sample": 0, "passed": False}]
    write_samples(tmp_path / "s.jsonl", records)
    assert read_samples(tmp_path / "s.jsonl", TASKS) == records
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]


def test_answers_to_one_task_are_numbered(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(lines(A, B, A) + "\n")
    assert [(r["id"], r["sample"]) for r in read_samples(path, TASKS)] == [
        ("a", 0), ("b", 0), ("a", 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{\n", "line 1: not JSON"),
        (lines(A) + "[1]\n", "line 2: an object is needed, got list"),
        (lines({"id": "a"}), "line 1: the text field 'completion' .or 'solution'. is missing"),
        (lines({"completion": "x"}), "the text field 'id' is missing"),
        (lines(A, {**A, "id": "zebra"}), "line 2: there is no task 'zebra' among the 2"),
        (lines(A), "no sample for 1 of 2 tasks: b"),
        ("", "no sample for 2 of 2 tasks: a, b"),
        (lines({**A, "sample": 1}, B, {**A, "sample": 1}), "sample 1 of task 'a' is there twice"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, text, message):
    path = tmp_path / "s.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_samples(path, TASKS)


def test_an_unfinished_run_may_lack_tasks(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(lines(A))
    assert len(read_samples(path, TASKS, partial=True)) == 1


def test_the_names_of_other_peoples_files_will_do(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text(lines({"task_id": "a", "solution": "x"}, {"id": "b", "completion": "\u2028"}))
    assert [record["id"] for record in read_samples(path, TASKS)] == ["a", "b"]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "s.jsonl"
    append_samples(path, [A, B])
    append_samples(path, [A])
    path.write_text(path.read_text()[:-5])
    assert read_partial(path) == [A, B]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_samples(tmp_path / "none.jsonl", TASKS)
