"""Finding the program in a model's reply: one rule for every model and prompt form."""

import ast
import contextlib
import re
import warnings

_FENCE = re.compile(
    r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.M | re.S
)
_PYTHON = ("python", "py", "python3")
_STARTS = re.compile(r"^(?:async def |def |class |import |from \w|@)", re.M)
_KEPT = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Import,
    ast.ImportFrom,
    ast.Assign,
    ast.AnnAssign,
)


def extract_program(reply: str, name: str) -> str:
    """Returns the Python source in `reply` that defines `name`, or "" if there is none.

    The first code block that defines `name` (a block said to be Python before others), else the
    text from its first line of code on, cut at the first line that no longer parses. Of what is
    found, only imports, definitions and assignments stay: calls that show the function off, or
    test it, are the model's and not the task's.
    """
    blocks = [(kind.lower(), code) for _, kind, code in _FENCE.findall(reply)]
    blocks.sort(key=lambda block: block[0] not in _PYTHON)  # stable: first come, first taken
    sources = [code for _, code in blocks] + [reply]
    for source in sources:
        if not re.search(rf"\bdef\s+{re.escape(name)}\b", source):
            continue
        with warnings.catch_warnings(action="ignore"):  # on odd escapes in strings
            tree = _parse_start(source)
        if tree is not None and _defines(tree, name):
            tree.body = [node for node in tree.body if isinstance(node, _KEPT)]
            with contextlib.suppress(RecursionError):  # thousands of nested brackets
                return ast.unparse(tree) + "\n"
    return ""


def _defines(tree: ast.Module, name: str) -> bool:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return any(isinstance(node, functions) and node.name == name for node in tree.body)


def _parse_start(source: str) -> ast.Module | None:
    """Parses `source` from its first line of code, dropping lines at the end until it parses."""
    start = _STARTS.search(_dedent(source))
    lines = _dedent(source)[start.start() :].splitlines() if start else []
    end = len(lines)
    while end > 0:
        try:
            return ast.parse("\n".join(lines[:end]))
        except SyntaxError as error:
            # A broken line, or the one where an unfinished bracket or string began.
            end = min(end - 1, max((error.lineno or end) - 1, 0))
        except (ValueError, RecursionError, MemoryError):
            return None
    return None


def _dedent(source: str) -> str:
    lines = source.splitlines()
    first = next((line for line in lines if _STARTS.match(line.lstrip())), "")
    indent = first[: len(first) - len(first.lstrip())]
    return "\n".join(line.removeprefix(indent) for line in lines)
