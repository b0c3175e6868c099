"""HumanEval(+) and MBPP(+): Python functions, their tests run apart from them.

HumanEval: Chen et al. 2021, arXiv 2107.03374. MBPP: Austin et al. 2021, arXiv 2108.07732. Plus
versions: Liu et al. 2023, arXiv 2305.01210, read as the hub has them (`test`) and, for HumanEval+,
as EvalPlus releases them (`base_input`, `plus_input`, `canonical_solution`).
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.core.errors import InputError
from moejax.evals.extract import extract_program
from moejax.evals.tasks.base import Item, Prompt, Task, cut, text_id
from moejax.evals.tasks.python_grade import grade

# Where a continued function ends: the first line of something else (the paper's list).
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```", "<|endoftext|>")
_INSTRUCTION = (
    "Write a solution to the following problem and make sure that it passes the tests:\n"
    "```python\n{problem}\n```"
)


def make_item(row: Mapping[str, Any], number: int, where: str) -> Item:
    """An item of either set, from any of the published forms."""
    identifier = text_id(row, number, "task")
    if "test_list" in row and "entry_point" not in row:
        return _mbpp_item(identifier, row, where)
    for name in ("prompt", "entry_point"):
        if not isinstance(row.get(name), str):
            raise InputError(f"{where}: field {name!r} is {type(row.get(name)).__name__}, not text")
    entry = row["entry_point"]
    prompt_code = row["prompt"] if f"def {entry}" in row["prompt"] else ""
    exam = {"entry": entry, "names": [entry], "problem": row["prompt"], "plus": False}
    if row.get("plus_input") is not None and row.get("canonical_solution") is not None:
        exam |= {"plus": True, "setup": prompt_code + row["canonical_solution"]}
        exam["test"] = ""
        return Item(identifier, {**row, "exam": exam})
    exam["setup"] = _completed(prompt_code) if prompt_code else ""
    exam["test"] = row["test"] + "\n\ncheck(candidate)\n"
    return Item(identifier, {**row, "exam": exam}, _weak(exam, identifier))


def _mbpp_item(identifier: str, row: Mapping[str, Any], where: str) -> Item:
    """MBPP as it was published: a description, a list of asserts, a reference."""
    tests = row["test_list"]
    if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
        raise InputError(f"{where}: test_list must be a list of at least one assert")
    code = row.get("code") or row.get("canonical_solution") or ""
    called = _called("\n".join(tests))
    defined = [name for name in _defined(code) if name in called]
    names = defined or [name for name in called if not hasattr(builtins, name)]
    if not names:
        raise InputError(f"{where}: the tests call no function by name: {tests[0][:80]!r}")
    setup = [row.get("test_setup_code") or "", *(row.get("test_imports") or [])]
    text = (row.get("text") or row.get("prompt") or "").strip()
    exam = {
        "entry": names[0],
        "names": names,
        "setup": "\n".join(setup),
        "test": row["test"] if row.get("test") else "\n".join(tests),
        "problem": f'"""\n{text}\n{tests[0]}\n"""\n',
        "plus": False,
    }
    return Item(identifier, {**row, "text": text, "exam": exam}, _weak(exam, identifier))


def _completed(prompt: str) -> str:
    """The prompt with a body for its last function, so that its imports and helpers can be used."""
    last = next(line for line in reversed(prompt.splitlines()) if line.strip())
    indent = last[: len(last) - len(last.lstrip())] or "    "
    for source in (prompt + f"\n{indent}pass\n", prompt + "\n    pass\n"):
        try:
            ast.parse(source)
        except SyntaxError:
            continue
        return source
    return "\n".join(line for line in prompt.splitlines() if re.match(r"(import|from) ", line))


def _defined(code: str) -> list[str]:
    try:
        body = ast.parse(code).body
        return [node.name for node in body if isinstance(node, ast.FunctionDef)]
    except SyntaxError:
        return []


def _called(code: str) -> list[str]:
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return []
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return list(dict.fromkeys(call.id for call in calls if isinstance(call, ast.Name)))


def _weak(exam: Mapping[str, Any], identifier: str) -> str:
    """Why these tests cannot be held apart from the program, "" if they can."""
    known = {"candidate", "check", "Exception", *exam["names"], *dir(builtins)}
    known |= set(_bound(exam["setup"])) | set(_bound(exam["test"]))
    unknown = [name for name in _called(exam["test"]) if name not in known]
    if unknown:
        return f"its tests use {unknown[0]}, which the program defines"
    return ""


def _bound(code: str) -> list[str]:
    """Every name that the code itself binds: imports, definitions, assignments, arguments."""
    names: list[str] = []
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return names
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            names.append((node.asname or node.name).split(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.arg):
            names.append(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
    return names


# -- how it is asked -------------------------------------------------------------------------------


def completion(item: Item) -> Prompt:
    """The problem's text, to be continued."""
    problem = item.row["exam"]["problem"]
    return Prompt(None, problem, STOPS if "def " in problem else ("\nassert", '\n"""', "\nprint("))


def chat(item: Item) -> Prompt:
    """A user's turn with the problem in a fence; the model answers freely."""
    return Prompt(_INSTRUCTION.format(problem=item.row["exam"]["problem"].strip()), "")


def fence(item: Item) -> Prompt:
    """As `chat`, with the answer's code block opened and the problem in it (XFT's form)."""
    problem = item.row["exam"]["problem"].strip("\n")
    return Prompt(_INSTRUCTION.format(problem=problem), f"```python\n{problem}\n", ("```",))


def three_shot(item: Item) -> Prompt:
    """MBPP's own form: the description and the tests, then the code between [BEGIN] and [DONE]."""
    row = item.row
    if "test_list" not in row:
        return completion(item)
    text = _ask(row["text"], row["test_list"])
    return Prompt(None, "".join(_SHOTS) + text + "[BEGIN]\n", ("[DONE]",))


def _ask(text: str, tests: Sequence[str]) -> str:
    return (
        f"You are an expert Python programmer, and here is your task: {text} "
        "Your code should pass these tests:\n\n" + "\n".join(tests) + "\n"
    )


_SHOTS = tuple(
    _ask(text, tests) + f"[BEGIN]\n{code}\n[DONE]\n\n"
    for text, tests, code in (
        (
            "Write a function to double a number.",
            ["assert double(3) == 6", "assert double(0) == 0", "assert double(-2) == -4"],
            "def double(n):\n    return 2 * n",
        ),
        (
            "Write a function to count the vowels of a word.",
            ["assert vowels('tree') == 2", "assert vowels('sky') == 0", "assert vowels('a') == 1"],
            "def vowels(word):\n    return sum(letter in 'aeiou' for letter in word)",
        ),
        (
            "Write a function to find the largest item of a list of lists.",
            ["assert largest([[1], [2, 5]]) == 5", "assert largest([[0]]) == 0"],
            "def largest(lists):\n    return max(max(items) for items in lists)",
        ),
    )
)


def extract(item: Item, form: str, text: str) -> str:
    """The program: the problem's code continued, or what a reply's code blocks define."""
    exam = item.row["exam"]
    if form in ("chat", "fence") or "```" in text:
        return extract_program(text, exam["entry"])
    if form == "three_shot" and "test_list" in item.row:
        return cut(text, ("[DONE]",))
    return exam["problem"] + text


_ROWS = (("prompt", "entry_point", "test"), ("prompt", "entry_point", "plus_input"))
_FORMS = {"completion": completion, "chat": chat, "fence": fence}
HUMANEVAL = Task(
    "humaneval", "openai/openai_humaneval", _ROWS, make_item, _FORMS, extract, grade, True
)
HUMANEVAL_PLUS = Task(
    "humaneval_plus", "evalplus/humanevalplus", _ROWS, make_item, _FORMS, extract, grade, True,
    "format only",
)  # fmt: skip
_MBPP_ROWS = (*_ROWS, ("test_list", "text"), ("test_list", "prompt"))
_MBPP_FORMS = {"three_shot": three_shot, **_FORMS}
MBPP = Task(
    "mbpp", "google-research-datasets/mbpp", _MBPP_ROWS, make_item, _MBPP_FORMS, extract, grade,
    True,
)  # fmt: skip
MBPP_PLUS = Task(
    "mbpp_plus", "evalplus/mbppplus", _MBPP_ROWS, make_item, _MBPP_FORMS, extract, grade, True,
    "format only",
)  # fmt: skip
