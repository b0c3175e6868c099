"""Near-duplicate functions: equal but for the names of their variables, or mostly equal tokens."""

from __future__ import annotations

import ast
import builtins
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TypeVar

SHINGLE_TOKENS = 5
# Jaccard similarity of shingle sets from which two functions count as the same text
SIMILARITY = 0.6

T = TypeVar("T")


def drop_near_duplicates(items: Sequence[tuple[T, ast.FunctionDef]]) -> list[T]:
    """The first of each group of near-duplicates, in order.

    Two functions are near-duplicates if their bodies are the same syntax tree up to the names of
    parameters and variables, or if the sets of their bodies' 5-token shingles have Jaccard
    similarity |A & B| / |A | B| >= 0.6.
    """
    kept: list[T] = []
    seen_trees: set[str] = set()
    sizes: list[int] = []
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for item, node in items:
        body = ast.Module(without_docstring(node), [])
        tree = normalised(body)
        if tree in seen_trees:
            continue
        marks = shingles(ast.unparse(body))
        shared = Counter(index for mark in marks for index in holders.get(mark, ()))
        if any(n / (len(marks) + sizes[i] - n) >= SIMILARITY for i, n in shared.items()):
            continue
        seen_trees.add(tree)
        for mark in marks:
            holders[mark].append(len(kept))
        sizes.append(len(marks))
        kept.append(item)
    return kept


def without_docstring(node: ast.FunctionDef) -> list[ast.stmt]:
    """The statements of a function's body after its docstring."""
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def normalised(body: ast.Module) -> str:
    """The syntax tree as text with variables numbered in order of appearance.

    Builtins and attributes keep their names: they are what a function does.
    """
    dump = ast.dump(body)
    numbers: dict[str, str] = {}

    def rename(match: re.Match[str]) -> str:
        name = match.group(2)
        if hasattr(builtins, name):
            return match.group(0)
        return f"{match.group(1)}='{numbers.setdefault(name, f'v{len(numbers)}')}'"

    return re.sub(r"\b(id|arg)='(\w+)'", rename, dump)


def shingles(code: str) -> set[tuple[str, ...]]:
    """All runs of SHINGLE_TOKENS consecutive tokens (the whole, where there are fewer)."""
    tokens = re.findall(r"\w+|[^\w\s]", code)
    count = max(1, len(tokens) - SHINGLE_TOKENS + 1)
    return {tuple(tokens[i : i + SHINGLE_TOKENS]) for i in range(count)}
