"""HumanEval's, MBPP's and the plus sets' published schemas, by hand: read, asked, judged."""

import pytest

from moejax.core.errors import InputError
from moejax.evals.tasks import TASKS, Grading
from moejax.evals.tasks.python_code import extract, make_item, three_shot

RUN = Grading(allow_code_execution=True, num_workers=2)
HUMANEVAL = {
    "task_id": "T/0",
    "prompt": (
        "import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef area(r: float) -> float:\n"
        '    """ Area of a circle.\n    >>> area(0)\n    0.0\n    """\n'
    ),
    "entry_point": "area",
    "canonical_solution": "    return math.pi * r ** 2\n",
    "test": (
        "def check(candidate):\n    assert abs(candidate(half(2)) - math.pi) < 1e-6\n"
        "    assert candidate(0) == 0\n"
    ),
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to remove the first occurrence of a letter.",
    "code": "def remove(s, c):\n    return s.replace(c, '', 1)",
    "test_list": ["assert remove('abc', 'b') == 'ac'", "assert remove('aa', 'a') == 'a'"],
    "test_setup_code": "",
}
PLUS_RAW = {
    **{name: HUMANEVAL[name] for name in ("prompt", "entry_point", "canonical_solution")},
    "task_id": "HumanEval/0",
    "base_input": [[1.0], [2]],
    "plus_input": [[1e6], [-3]],
    "atol": 0,
    "test": "unused",
}
PLUS_HUB = {
    "task_id": "HumanEval/1",
    "prompt": 'def inc(x):\n    """Add one."""\n',
    "entry_point": "inc",
    "canonical_solution": "    return x + 1\n",
    "test": (
        "import numpy as np\n\ndef assertion(out, exp, atol):\n    assert out == exp or "
        "np.allclose(out, exp, rtol=1e-07, atol=atol)\n\n\ndef check(candidate):\n"
        "    for inp, exp in zip([[1], [2.5]], [2, 3.5]):\n"
        "        assertion(candidate(*inp), exp, 0)\n"
    ),
}
PAIR = {
    **MBPP,
    "task_id": 601,
    "code": "class Pair:\n    def __init__(self, a): self.a = a\ndef first(p):\n    return p.a",
    "test_list": ["assert first(Pair(3)) == 3"],
}
TYPES = {**MBPP, "task_id": 533, "code": "def is_a(x, kind): return isinstance(x, kind)",
         "test_list": ["assert is_a('x', str)", "assert not is_a(1, str)"]}  # fmt: skip


def verdicts(row, *programs):
    item = make_item(row, 0, "here")
    grades = TASKS["humaneval"].grade([(item, program) for program in programs], RUN)
    return [(judged.verdict, judged.weak) for judged in grades]


@pytest.mark.parametrize("row", [HUMANEVAL, PLUS_RAW, PLUS_HUB], ids=["base", "raw", "hub"])
def test_a_continued_prompt_passes_and_a_mutant_fails(row):
    item = make_item(row, 0, "here")
    right = extract(item, "completion", row["canonical_solution"])
    wrong = extract(item, "completion", "    return 7\n")
    gone = "import os\nos._exit(0)"
    assert verdicts(row, right, wrong, gone) == [
        ("pass", False),
        ("wrong", False),
        ("error", False),
    ]


def test_mbpp_as_it_was_published():
    wrong = MBPP["code"].replace(", 1)", ")")
    assert verdicts(MBPP, MBPP["code"], wrong, "") == [
        ("pass", False), ("wrong", False), ("no program", False)
    ]  # fmt: skip
    item = make_item(MBPP, 0, "here")
    prompt = three_shot(item)
    assert prompt.prefix.count("[BEGIN]") == 4 and prompt.prefix.endswith("== 'a'\n[BEGIN]\n")
    assert extract(item, "three_shot", MBPP["code"] + "\n[DONE]\nmore") == MBPP["code"] + "\n"


def test_tests_that_need_the_programs_own_class_are_weaker_and_say_so():
    item = make_item(PAIR, 0, "here")
    assert "Pair" in item.weak
    assert verdicts(PAIR, PAIR["code"], PAIR["code"].replace("p.a", "0")) == [
        ("pass", True), ("wrong", True)
    ]  # fmt: skip


def test_arguments_that_are_no_data_are_judged_the_weaker_way():
    early = "import os\ndef is_a(x, kind): os._exit(0)"
    assert verdicts(TYPES, TYPES["code"], early) == [("pass", True), ("error", True)]


def test_a_function_called_check_is_no_trap():
    row = {
        "task_id": "M/56",
        "prompt": 'def check(n):\n    """Even?"""\n',
        "entry_point": "check",
        "test": "def check(candidate):\n    assert candidate(2) == True\n",
    }
    assert verdicts(row, "def check(n): return n % 2 == 0") == [("pass", False)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**HUMANEVAL, "prompt": 3}, "here: field 'prompt' is int, not text"),
        ({**MBPP, "test_list": []}, "here: test_list must be a list of at least one assert"),
        ({**MBPP, "code": "", "test_list": ["assert 1"]}, "here: the tests call no function"),
    ],
)
def test_a_bad_row_is_named(row, message):
    with pytest.raises(InputError, match=message):
        make_item(row, 0, "here")
