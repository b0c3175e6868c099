"""The shape of the house: which part may import which, what an import may do, how long things are.

Everything is read from the source by `ast`, so that an import inside a function counts too.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# From the bottom up; a part may import its own floor and those below.
FLOORS = (
    {"core"},
    {"ops"},
    {"moe"},
    {"models"},
    {"io", "data"},
    {"train", "serve", "methods"},
    {"evals", "aot", "report"},
    {"launch"},
)
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
STRANGERS = {("methods", "train"), ("train", "methods")}
FORBIDDEN_STEMS = {"utils", "util", "helpers", "helper", "common", "misc"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 75

LIBRARY = sorted((ROOT / "moejax").rglob("*.py"))
MAINS = sorted((ROOT / "launch").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def part_of(path: Path) -> str | None:
    """'moe' for moejax/moe/layer.py, 'launch' for launch/*.py, None for moejax/*.py (the front)."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "launch":
        return "launch"
    return parts[1] if len(parts) > 2 else None


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full module name) of every import in a file; relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def arrow_offences(path: Path) -> Iterator[str]:
    own = part_of(path)
    # The front of the package (moejax/*.py) may gather from every part, but not from launch/.
    part = own or "report"
    for line, name in imported(path):
        where = f"{label(path)}:{line}"
        top, _, rest = name.partition(".")
        target = "launch" if top == "launch" else rest.partition(".")[0]
        if top not in ("moejax", "launch"):
            continue
        if part not in FLOOR_OF:
            yield f"{label(path)}: {part} has no floor; add it to FLOORS where the design puts it"
            return
        if target not in FLOOR_OF:
            if own not in (None, "launch"):
                yield f"{where}: {part} imports the front ({name})"
        elif FLOOR_OF[target] > FLOOR_OF[part] or (part, target) in STRANGERS:
            yield f"{where}: {part} -> {target}"


def environment_offences(path: Path) -> Iterator[str]:
    for line, name in imported(path):
        if name.startswith("absl.flags") or name in ("os.environ", "os.getenv"):
            yield f"{label(path)}:{line}: imports {name}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            yield f"{label(path)}:{node.lineno}: {ast.unparse(node)}"


def length_offences(path: Path) -> Iterator[str]:
    source = path.read_text()
    if source.count("\n") > MAX_FILE_LINES:
        yield f"{label(path)}: {source.count(chr(10))} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{label(path)}: {node.name} has {length} lines"


def skip_offences(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr == "importorskip":
            yield f"{label(path)}:{node.lineno}"


def test_imports_run_one_way() -> None:
    assert not [offence for path in LIBRARY + MAINS for offence in arrow_offences(path)]


def test_library_reads_no_flags_and_no_environment() -> None:
    assert not [offence for path in LIBRARY for offence in environment_offences(path)]


def test_files_and_functions_stay_short() -> None:
    assert not [offence for path in LIBRARY + MAINS + TESTS for offence in length_offences(path)]


def test_names_say_something() -> None:
    assert not [label(path) for path in LIBRARY + MAINS + TESTS if path.stem in FORBIDDEN_STEMS]


def test_no_test_takes_its_file_away() -> None:
    """`importorskip` hides a whole file; the `parity` mark gives each test its reason."""
    assert not [offence for path in TESTS for offence in skip_offences(path)]


def test_importing_every_module_touches_no_device() -> None:
    """With a platform that does not exist, the first use of a backend raises."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in LIBRARY
    ]
    program = f"""
import importlib
for name in {names!r}:
    importlib.import_module(name)
import jax
try:
    jax.devices()
except RuntimeError:
    print("untouched")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "untouched"


def test_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
