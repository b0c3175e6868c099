"""The shipped tasks are sound: every reference passes, every mutant and every shortcut fails."""

import json

import pytest

from moejax.core.errors import InputError
from moejax.evals import plain
from moejax.evals.functions import judge
from moejax.evals.sandbox import Job, run_many
from moejax.evals.tasks_functions import PROMPT_FORMS, load_tasks, prompt

TASKS = load_tasks()


def words(programs: list[str]) -> dict[str, str]:
    jobs = [
        Job(program, task.name, [arguments for arguments, _ in task.tests])
        for task, program in zip(TASKS, programs, strict=True)
    ]
    verdicts = run_many(jobs, allow_code_execution=True, num_workers=4)
    pairs = zip(TASKS, verdicts, strict=True)
    return {task.id: judge(task, verdict)[0] for task, verdict in pairs}


def test_there_are_about_thirty_with_five_tests_each():
    assert 28 <= len(TASKS) <= 40
    assert all(len(task.tests) >= 5 for task in TASKS)
    assert len({task.name for task in TASKS}) == len(TASKS)


def test_every_reference_solution_passes():
    outcome = words([task.solution for task in TASKS])
    assert outcome == dict.fromkeys(outcome, "pass")


def test_every_mutant_fails():
    outcome = words([task.mutant for task in TASKS])
    assert outcome == dict.fromkeys(outcome, "wrong")


def test_no_task_is_passed_by_a_constant_or_by_its_first_argument():
    for task in TASKS:
        for constant in (None, 0, 1, True, False, [], ""):
            assert not all(plain.equal(constant, expected) for _, expected in task.tests), task.id
        assert not all(plain.equal(args[0], expected) for args, expected in task.tests), task.id


def test_prompts_name_the_signature_and_say_what_is_wanted():
    for form in PROMPT_FORMS:
        for task in TASKS:
            message, prefix = prompt(task, form)
            assert task.signature in message and task.description in message
            assert task.solution not in message + prefix
    assert prompt(TASKS[0], "fence")[1] == "```python\ndef add(a, b):\n"
    with pytest.raises(InputError, match="no prompt form 'haiku': choose from chat, fence"):
        prompt(TASKS[0], "haiku")


LINE = {"id": "a", "name": "f", "signature": "f(x)", "description": "returns x"}
TESTS = {"tests": [{"args": [1], "expected": 1}]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "line 1: not JSON"),
        (json.dumps(LINE), "line 1: not a task"),
        (json.dumps({**LINE, **TESTS, "colour": 1}), "colour"),
        (json.dumps({**LINE, "tests": []}), "0 tests"),
        (json.dumps({**LINE, "tests": [{"args": [1]}]}), "expected"),
        (json.dumps([1]), "not a task"),
        ("\n".join([json.dumps({**LINE, **TESTS})] * 2), "'a' is there twice"),
    ],
)
def test_a_bad_task_file_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "tasks.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        load_tasks(str(path))
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def test_a_missing_task_file_is_named():
    with pytest.raises(InputError, match="no task file /no/such"):
        load_tasks("/no/such")


def test_a_task_file_is_read_in_order(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps({**LINE, **TESTS, "id": i}) + "\n" for i in "bac"))
    assert [task.id for task in load_tasks(str(path))] == ["b", "a", "c"]
