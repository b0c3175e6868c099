"""DS-1000, GSM8K, MATH and AIME: their published schemas, by hand."""

import pytest

from moejax.core.errors import InputError
from moejax.evals.tasks import TASKS, Grading, load_items, with_shots
from moejax.evals.tasks.answer_tasks import aime_item, gsm8k_item, math_item
from moejax.evals.tasks.ds1000 import extract, insertion, make_item

RUN = Grading(allow_code_execution=True, num_workers=2)
CONTEXT = """
import copy
import numpy as np

def generate_test_case(test_case_id):
    return np.array([1, 2, 3]), 6

def exec_test(result, ans):
    return int(result == ans)

exec_context = r'''
import numpy as np
a = test_input
[insert]
'''

def test_execution(solution: str):
    code = exec_context.replace("[insert]", solution)
    test_input, expected = generate_test_case(1)
    env = {"test_input": test_input}
    exec(code, env)
    assert exec_test(env["result"], expected)

def test_string(solution: str):
    assert "for" not in solution
"""
DS = {
    "prompt": "Problem:\nSum the array.\nA:\n<code>\nimport numpy as np\n[insert]\n</code>\n"
    "print(result)\n",
    "reference_code": "result = a.sum()",
    "code_context": CONTEXT,
    "metadata": {"problem_id": 5, "library": "Numpy", "perturbation_type": "Origin"},
}


def test_ds1000_runs_the_problems_own_tests():
    item = make_item(DS, 0, "here")
    codes = ["result = a.sum()", "result = a.max()", "for x in a: result = 6", "exit()"]
    grades = TASKS["ds1000"].grade([(item, code) for code in codes], RUN)
    assert [g.verdict for g in grades] == ["pass", "wrong", "wrong", "error"], grades
    assert all(g.weak for g in grades) and item.id == "5"


def test_ds1000_forms():
    item = make_item(DS, 0, "here")
    first = TASKS["ds1000"].forms["completion"](item)
    assert first.prefix.endswith("import numpy as np\n") and "</code>" in first.stop
    assert "print(result)" in insertion(item).prefix.split("Problem:")[0]
    assert extract(item, "chat", "Here:\n```python\nresult = 1\n```") == "result = 1\n"
    assert extract(item, "completion", "result = 1\n</code>\nmore") == "result = 1\n"


def test_ds1000_without_its_package_is_not_scored():
    item = make_item({**DS, "metadata": {"library": "Tensorflow"}}, 0, "here")
    (judged,) = TASKS["ds1000"].grade([(item, "result = 6")], RUN)
    assert judged.verdict == "unscored" and "package tensorflow is not installed" in judged.reason


def test_gsm8k():
    item = gsm8k_item({"question": "16 - 7?", "answer": "16-7=<<16-7=9>>9\n#### 9"}, 3, "here")
    grades = TASKS["gsm8k"].grade(
        [(item, text) for text in ("It is 9.", "#### 9.0", "10", "none")], RUN
    )
    assert [g.verdict for g in grades] == ["pass", "pass", "wrong", "no answer"]
    assert [g.answer for g in grades] == ["9", "9", "10", None] and item.id == "gsm8k/3"
    assert TASKS["gsm8k"].forms["question"](item).prefix == "Question: 16 - 7?\nAnswer:"
    with pytest.raises(InputError, match="here: 'answer' holds no number"):
        gsm8k_item({"question": "?", "answer": "#### none"}, 0, "here")


def test_shots_come_from_other_problems(tmp_path):
    path = tmp_path / "gsm.jsonl"
    rows = [f'{{"question": "{i} + 1?", "answer": "#### {i + 1}"}}\n' for i in range(6)]
    path.write_text("".join(rows))
    task = TASKS["gsm8k"]
    items = with_shots(task, load_items(task, str(path)), 3, str(path), seed=1)
    for item in items:
        prefix = task.forms["question"](item).prefix
        assert prefix.count("Question:") == 4 and prefix.count("####") == 3
        assert prefix.count(item.row["question"]) == 1
    assert items == with_shots(task, load_items(task, str(path)), 3, str(path), seed=1)
    with pytest.raises(InputError, match="--shots=6 needs more than 6 problems"):
        with_shots(task, items, 6, str(path))


def test_math_and_aime_rows():
    item = math_item({"problem": "?", "solution": r"so \boxed{\frac{1}{2}}"}, 0, "here")
    assert item.row["exam"]["gold"] == r"\frac{1}{2}"
    assert "\\boxed{}" in TASKS["math"].forms["chat"](item).message
    with pytest.raises(InputError, match="here: no 'answer', and 'solution' boxes none"):
        math_item({"problem": "?", "solution": "unknown"}, 0, "here")
    aime = aime_item({"Problem": "?", "Answer": 73, "ID": "2024-I-1"}, 0, "here")
    assert aime.id == "2024-I-1" and aime.row["exam"]["gold"] == 73
    grades = TASKS["aime"].grade([(aime, r"\boxed{073}"), (aime, "The answer is 74")], RUN)
    assert [g.verdict for g in grades] == ["pass", "wrong"]
    with pytest.raises(InputError, match="an integer from 0 to 999, not '1/2'"):
        aime_item({"problem": "?", "answer": "1/2"}, 0, "here")


EQUAL = [
    (r"\frac{1}{2}", r"\boxed{0.5}", True), (r"\frac{1}{2}", r"\boxed{\dfrac12}", True),
    (r"x^2+1", r"\boxed{1 + x^2}", True), ("4", "The answer is $4$.", True),
    (r"\text{Monday}", r"\boxed{Monday}", True), (r"(1, 2)", r"\boxed{(1,2)}", True),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", True), (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}", False),
    ("4", r"\boxed{5}", False), (r"x^2+1", r"\boxed{x^2-1}", False), ("4", "no idea", None),
]  # fmt: skip


def test_math_verify_decides():
    try:
        import math_verify  # noqa: F401
    except ImportError:
        item = math_item({"problem": "?", "answer": "4"}, 0, "here")
        with pytest.raises(InputError, match="pip install 'moejax"):
            TASKS["math_500"].grade([(item, r"\boxed{4}")], RUN)
        return
    for gold, text, same in EQUAL:
        item = math_item({"problem": "?", "answer": gold}, 0, "here")
        (judged,) = TASKS["math_500"].grade([(item, text)], RUN)
        wanted = {True: "pass", False: "wrong", None: "no answer"}[same]
        assert judged.verdict == wanted, (gold, text, judged)
