"""One extraction rule, on replies as models write them."""

import pytest

from moejax.evals.extract import extract_program

ADD = "def add(a, b):\n    return a + b\n"
REPLIES = {
    "fenced": f"Here it is:\n\n```python\n{ADD}```\n\nIt adds.",
    "fence named py": f"```py\n{ADD}```",
    "fence with capital": f"```Python\n{ADD}```",
    "fence without a name": f"```\n{ADD}```",
    "tildes": f"~~~python\n{ADD}~~~",
    "four ticks": f"````python\n{ADD}````",
    "unclosed fence": f"Sure!\n```python\n{ADD}",
    "bare code": ADD,
    "bare code after words": f"Sure, this works:\n\n{ADD}",
    "bare code before words": f"{ADD}\nThis function adds its two arguments, a and b.",
    "bare code between words": f"You can define it so:\n{ADD}\nIt's simple: isn't it?",
    "indented fence in a list": (
        "1. Do:\n   ```python\n   def add(a, b):\n       return a + b\n   ```"
    ),
    "windows newlines": f"```python\n{ADD}```".replace("\n", "\r\n"),
    "a shell block first": f"```bash\npip install add\n```\n```python\n{ADD}```",
    "the wrong block first": f"```python\nprint(1)\n```\nthen\n```python\n{ADD}```",
    "an unnamed block before a Python one": f"```\ndef add(x): ...\n```\n```python\n{ADD}```",
    "two versions, the first counts": (
        f"```python\n{ADD}```\n```python\ndef add(a, b): return 0\n```"
    ),
    "tabs": "```python\ndef add(a, b):\n\treturn a + b\n```",
    "calls that show it off": f"```python\n{ADD}\nprint(add(1, 2))\nadd(1)\n```",
    "asserts and input": f"```python\n{ADD}assert add(1, 1) == 3\ninput()\n```",
    "a main guard": f"```python\n{ADD}\nif __name__ == '__main__':\n    print(add(1))\n```",
    "a docstring of prose": f'```python\n"""Adds."""\n{ADD}```',
    "cut in a call after it": f"```python\n{ADD}\nprint(add(1,",
    "cut in a string after it": f"```python\n{ADD}\nprint('the sum",
    "cut in another function": f"```python\n{ADD}\ndef sub(a, b):\n    return (a -",
    "a session after it": f"```python\n{ADD}>>> add(1, 2)\n3\n```",
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_the_function_is_found(reply):
    assert extract_program(reply, "add") == ADD


def test_what_the_function_needs_is_kept():
    reply = (
        "```python\nimport math\nfrom os import path\n\nLIMIT: int = 3\nOTHER = [1]\n\n"
        "class Box:\n    pass\n\n@staticmethod\ndef helper(x):\n    return x\n\n"
        "def area(r):\n    return math.pi * helper(r) ** 2\n```"
    )
    program = extract_program(reply, "area")
    for line in ("import math", "from os import path", "LIMIT: int = 3", "OTHER = [1]"):
        assert line in program
    for name in ("class Box", "@staticmethod", "def helper", "def area"):
        assert name in program


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I cannot do that.",
        "The function def add is easy.",
        "```python\ndef addition(a, b):\n    return a + b\n```",
        "```python\nclass Solution:\n    def add(self, a, b):\n        return a + b\n```",
        "```python\ndef add(a, b):\n```",
        "```python\ndef add(a, b):\n    return a +* b\n```",
        "```python\nadd = 3\n```",
        "def add(" + "(" * 10_000,
    ],
)
def test_nothing_is_found_where_nothing_is(reply):
    assert extract_program(reply, "add") == ""


def test_a_function_cut_short_keeps_what_it_says():
    reply = "```python\ndef add(a, b):\n    c = a\n    if b:\n        return c + b\n    return (c"
    assert extract_program(reply, "add") == (
        "def add(a, b):\n    c = a\n    if b:\n        return c + b\n"
    )


def test_a_long_reply_takes_no_time():
    reply = f"```python\n{ADD}" + "\nprint('x'" * 3000
    assert extract_program(reply, "add") == ADD
