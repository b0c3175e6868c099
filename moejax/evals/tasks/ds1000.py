"""DS-1000: data science problems, completion and insertion (Lai et al. 2022, arXiv 2211.11501).

Rows as released: `prompt`, `reference_code`, `metadata` and `code_context`, whose
`test_execution(solution)` and, for some, `test_string(solution)` judge a solution by running it in
their own process: every verdict is weak. A row with `insertion` (or a prompt with "[insert]") is
asked by what stands before and behind the gap. The packages that a library's problems need
(numpy, pandas, ...) must be installed here, else its problems are not scored.
"""

from __future__ import annotations

import importlib.util
import re
import secrets
import sysconfig
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.core.errors import InputError
from moejax.evals import sandbox
from moejax.evals.sandbox_process import Job
from moejax.evals.tasks.base import Grade, Grading, Item, Prompt, Task, cut
from moejax.evals.tasks.python_grade import judge_alone

_GAP = "[insert]"
_STOPS = ("</code>", "# SOLUTION END", "END SOLUTION", "\n```")
_PACKAGES = {
    "numpy": ("numpy",),
    "pandas": ("numpy", "pandas"),
    "matplotlib": ("numpy", "matplotlib", "PIL"),
    "scipy": ("numpy", "scipy"),
    "sklearn": ("numpy", "pandas", "sklearn"),
    "tensorflow": ("numpy", "tensorflow"),
    "pytorch": ("numpy", "torch"),
}
_MEMORY_BYTES = 4 << 30


def make_item(row: Mapping[str, Any], number: int, where: str) -> Item:
    """A problem; its library decides what it needs."""
    about = row["metadata"]
    if not isinstance(about, Mapping) or "library" not in about:
        raise InputError(f"{where}: 'metadata' needs the field 'library'")
    if "def test_execution" not in row["code_context"]:
        raise InputError(f"{where}: 'code_context' defines no test_execution")
    library = str(about["library"]).lower()
    identifier = str(about.get("problem_id", number))
    return Item(identifier, {**row, "library": library}, "its tests run the program themselves")


def completion(item: Item) -> Prompt:
    """The problem's text, to be continued up to its closing mark."""
    return Prompt(None, item.row["prompt"].split(_GAP)[0], _STOPS)


def insertion(item: Item) -> Prompt:
    """What stands behind the gap is told first, since the model writes from left to right."""
    before, gap, behind = item.row["prompt"].partition(_GAP)
    if not gap:
        return completion(item)
    told = f"The code ends with:\n{behind.strip()}\n\n" if behind.strip() else ""
    return Prompt(None, told + before, _STOPS)


def chat(item: Item) -> Prompt:
    """A user's turn; only the missing code is to be answered."""
    ask = "Write only the code that is missing, in one code block."
    return Prompt(f"{item.row['prompt']}\n\n{ask}", "")


def extract(item: Item, form: str, text: str) -> str:
    """The missing code: a reply's first block, or the text up to its end mark."""
    block = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.S)
    code = block.group(1) if block else text
    code = code.removeprefix("<code>").partition("BEGIN SOLUTION\n")[2] or code
    return cut(code.removeprefix("<code>"), _STOPS)


def lacking(item: Item, grading: Grading) -> str:
    """The package that an item's library needs and this machine lacks, as one line."""
    for name in _PACKAGES.get(item.row["library"], ()):
        if importlib.util.find_spec(name) is None:
            return f"DS-1000: package {name} is not installed (pip install {name})"
    return ""


def grade(pairs: Sequence[tuple[Item, str]], grading: Grading) -> list[Grade]:
    """Runs the problem's own tests on each solution."""
    grades: list[Grade | None] = []
    jobs, nonces = [], []
    folders = (sysconfig.get_path("purelib"), *grading.package_folders)
    for item, code in pairs:
        missing = lacking(item, grading)
        if missing:
            grades.append(Grade("unscored", missing, weak=True))
            continue
        grades.append(None)
        nonces.append(secrets.token_hex(8))
        context = item.row["code_context"]
        lines = [context, f"solution = {code!r}", "test_execution(solution)"]
        if "def test_string" in context:
            lines.append("test_string(solution)")
        lines.append(f"print('\\n{nonces[-1]}')")
        jobs.append(Job("\n".join(lines), packages=folders))
    limits = grading.limits
    verdicts = sandbox.run_many(
        jobs,
        type(limits)(
            wall_s=max(limits.wall_s, 120.0),
            cpu_s=max(limits.cpu_s, 60),
            memory_bytes=max(limits.memory_bytes, _MEMORY_BYTES),
            processes=max(limits.processes, 32),
            open_files=256,
        ),
        allow_code_execution=grading.allow_code_execution,
        num_workers=grading.num_workers or 2,
    )
    judged = map(judge_alone, verdicts, nonces)
    return [given if given is not None else next(judged) for given in grades]


DS1000 = Task(
    "ds1000",
    "xlangai/DS-1000",
    (("prompt", "code_context", "metadata"),),
    make_item,
    {"completion": completion, "insertion": insertion, "chat": chat},
    extract,
    grade,
    executes=True,
    checked="format only",
)
