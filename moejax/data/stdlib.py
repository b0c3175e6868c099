"""Instruction pairs that every machine has: the functions of Python's own standard library.

Prompt: one fixed instruction, the function's signature and the first paragraph of its docstring.
Answer: the whole function, without the docstring (it stands in the prompt, and copying it would be
counted as skill). Functions at module level only: methods need a class that the prompt lacks.

Held out by top-level package, so no held-out function shares a file with one trained on, and
near-duplicates are dropped. The corpus depends on the Python version alone; both it and a hash of
the corpus are recorded.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import json
import os
import platform
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejax.core.errors import InputError
from moejax.data.duplicates import drop_near_duplicates, without_docstring
from moejax.data.examples import Record, pair

INSTRUCTION = "Write this Python function."
SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
    + ("lib2to3", "turtledemo", "pydoc_data", "encodings", "ensurepip")
)


@dataclass(frozen=True)
class StdlibConfig:
    """What is taken.

    max_chars: longest prompt plus answer in characters; with 380 about eight in ten fit whole in
    128 tokens of SmolLM2, chat wrapper included.
    min_body_chars: shortest body, docstring not counted, in characters.
    heldout_share: largest share of functions held out.
    seed: order of both parts (the hash of the corpus does not depend on it).
    """

    max_chars: int = 380
    min_body_chars: int = 30
    heldout_share: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.heldout_share < 1:
            raise InputError(f"heldout_share is {self.heldout_share}; give a share between 0 and 1")
        if not 0 < self.min_body_chars < self.max_chars:
            raise InputError(
                f"min_body_chars {self.min_body_chars} must be positive and below max_chars "
                f"{self.max_chars}"
            )


@dataclass(frozen=True)
class Pair:
    """One function: `id` is `path:line:name`, `package` its top-level package or module."""

    id: str
    package: str
    prompt: str
    answer: str

    def record(self) -> Record:
        return pair(self.id, self.prompt, self.answer)


@dataclass(frozen=True)
class Corpus:
    """Training and held-out pairs with what identifies them."""

    train: list[Pair]
    heldout: list[Pair]
    python_version: str
    sha256: str
    num_duplicates: int

    def summary(self) -> dict[str, Any]:
        """What a report records about the corpus (plain JSON values)."""
        return {
            "source": "the Python standard library",
            "python_version": self.python_version,
            "sha256": self.sha256,
            "train": len(self.train),
            "heldout": len(self.heldout),
            "heldout_packages": sorted({p.package for p in self.heldout}),
            "near_duplicates_dropped": self.num_duplicates,
        }


def load_corpus(config: StdlibConfig = StdlibConfig(), root: str | Path | None = None) -> Corpus:
    """The corpus of the running Python (or of a folder `root` of sources): a few seconds.

    InputError where the folder has no suitable function (some distributions strip the sources).
    """
    folder = Path(root or sysconfig.get_paths()["stdlib"])
    found = list(_functions(folder, config))
    if not found:
        raise InputError(
            f"{folder} holds no Python function with a docstring; install Python with its library "
            "sources, or give a data file"
        )
    pairs = drop_near_duplicates(found)
    content = json.dumps([[p.id, p.prompt, p.answer] for p in pairs], ensure_ascii=False)
    held = heldout_packages([p.package for p in pairs], config.heldout_share)
    shuffled = [pairs[i] for i in np.random.default_rng(config.seed).permutation(len(pairs))]
    return Corpus(
        train=[p for p in shuffled if p.package not in held],
        heldout=[p for p in shuffled if p.package in held],
        python_version=platform.python_version(),
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        num_duplicates=len(found) - len(pairs),
    )


def heldout_packages(packages: Sequence[str], share: float) -> set[str]:
    """Packages to hold out, given the package of every function.

    In the order of their names' hashes, each that still fits into `share` of the functions: chance
    decides, but no large package can make the held-out part a third of everything.
    """
    sizes = Counter(packages)
    room = share * len(packages)
    held = set()
    for package in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[package] <= room:
            held.add(package)
            room -= sizes[package]
    return held


def _functions(root: Path, config: StdlibConfig) -> Iterator[tuple[Pair, ast.FunctionDef]]:
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is many small objects; the collector doubles the time
    try:
        for path in _sources(root):
            parsed = _parse(path)
            if parsed is None:
                continue
            lines, tree = parsed
            for node in tree.body:
                if isinstance(node, ast.FunctionDef):
                    made = _pair(path.relative_to(root), node, lines, config)
                    if made is not None:
                        yield made, node
    finally:
        if collecting:
            gc.enable()


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(n for n in subfolders if n not in SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(folder) / name


def _parse(path: Path) -> tuple[list[str], ast.Module] | None:
    """Source lines and tree; None for files that are no UTF-8 or of another syntax."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources have escapes that Python warns about
            return source.splitlines(), ast.parse(source)
    except (SyntaxError, ValueError, OSError):
        return None


def _pair(path: Path, node: ast.FunctionDef, lines: list[str], config: StdlibConfig) -> Pair | None:
    """The pair of one function, or None where it is not suitable."""
    docstring = ast.get_docstring(node, clean=False)
    if docstring is None or not _has_work(without_docstring(node)):
        return None
    first, end = node.body[0], node.end_lineno or 0
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    if first.lineno == node.lineno or node.body[1].lineno <= (first.end_lineno or 0):
        return None  # squeezed into one line
    head, body = lines[start - 1 : first.lineno - 1], lines[first.end_lineno : end]
    paragraph = inspect.cleandoc(docstring).split("\n\n")[0].strip()
    indented = textwrap.indent(f'"""{paragraph}"""', " " * first.col_offset)
    question = "\n".join([*head, indented])
    function = "\n".join([*head, *_without_blank_start(body)])
    prompt = f"{INSTRUCTION}\n\n{fenced(question)}"
    answer = fenced(function)
    too_long = len(prompt) + len(answer) > config.max_chars
    too_short = len("".join(body).strip()) < config.min_body_chars
    if (
        too_long
        or too_short
        or len(paragraph.split()) < 3
        or not (_is_python(question) and _is_python(function))
    ):
        return None
    package = path.parts[0].removesuffix(".py")
    return Pair(f"{path.as_posix()}:{node.lineno}:{node.name}", package, prompt, answer)


def fenced(code: str) -> str:
    """Code as a chat model writes it."""
    return f"```python\n{code}\n```"


def _without_blank_start(lines: list[str]) -> list[str]:
    first = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    return lines[first:]


def _has_work(body: list[ast.stmt]) -> bool:
    """False for stubs: nothing but pass, raise and constants."""
    idle = (ast.Pass, ast.Raise)
    return any(
        not isinstance(s, idle)
        and not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
        for s in body
    )


def _is_python(code: str) -> bool:
    if "```" in code:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True
