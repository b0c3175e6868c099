"""MultiPL-E and MBXP: programs in other languages, their tests compiled or appended to them.

MultiPL-E: Cassano et al. 2022, arXiv 2208.08227 (rows with `prompt`, `tests`, `stop_tokens`,
`language`). MBXP and multilingual HumanEval: Athiwaratkun et al. 2022, arXiv 2210.14868 (`prompt`,
`test`, `entry_point`, `language`). Tests share the candidate's process: every verdict is weak. It
must reach the end of its tests, where it prints a text that is new for each run.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.core.errors import InputError
from moejax.evals import sandbox, toolchains
from moejax.evals.sandbox import Verdict
from moejax.evals.sandbox_process import Job
from moejax.evals.tasks.base import Grade, Grading, Item, Prompt, Task
from moejax.evals.tasks.python_grade import clean
from moejax.evals.toolchains import LANGUAGES, Toolchain

_WEAK = "its tests are part of the program"
# Where a continued function ends, for sets that do not say it themselves.
_STOPS = {
    "javascript": ("\nfunction ", "\n/*", "\n//", "\nconsole.log"),
    "perl": ("\nsub ", "\n#", "\n\n\n"),
    "cpp": ("\n}",),
    "java": ("\n    }\n",),
    "rust": ("\n}",),
    "php": ("\nfunction", "\n?>", "\n//", "\n#"),
}
_FENCE = re.compile(r"```[ \t]*([\w+#-]*)[^\n]*\n(.*?)(?:```|\Z)", re.S)
_FAILED = re.compile(r"did not pass|assert|Error at \d+th|not ok|Test failed", re.I)
_BROKEN = re.compile(r"SyntaxError|syntax error|ReferenceError|TypeError|Parse error", re.I)
# Comments, texts and characters, where a brace is no brace.
_NO_CODE = re.compile(r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'", re.S)


def make_item(row: Mapping[str, Any], number: int, where: str) -> Item:
    """An item of either set."""
    identifier = str(row.get("task_id") or row.get("name") or f"task/{number}")
    language = row.get("language") or identifier.split("/")[0].rpartition("_")[2]
    name = toolchains.language_of(str(language))
    if name is None:
        known = ", ".join(LANGUAGES)
        raise InputError(f"{where}: no language {language!r} here; there are {known}")
    tests = row["tests"] if row.get("tests") is not None else row["test"]
    stops = row.get("stop_tokens") or _STOPS[name]
    # MultiPL-E's tests close the function that the prompt opens; MBXP's do not.
    closes = row.get("tests") is None and name in ("cpp", "java", "rust")
    stops = ("\n}\n",) if closes else tuple(stops)
    fields = {"language": name, "tests": tests, "stops": stops, "closes": closes}
    return Item(identifier, {**row, "exam": fields}, _WEAK)


def completion(item: Item) -> Prompt:
    """The problem's text, to be continued."""
    return Prompt(None, item.row["prompt"], item.row["exam"]["stops"])


def chat(item: Item) -> Prompt:
    """A user's turn with the problem in a fence."""
    name = LANGUAGES[item.row["exam"]["language"]].name
    fence = f"```{item.row['exam']['language']}\n{item.row['prompt'].strip()}\n```"
    return Prompt(f"Complete this {name} function and write it out in full:\n{fence}", "")


def extract(item: Item, form: str, text: str) -> str:
    """The program without its tests."""
    exam = item.row["exam"]
    if form == "chat" or "```" in text:
        blocks = [code for _, code in _FENCE.findall(text)]
        entry = item.row.get("entry_point") or ""
        blocks = [block for block in blocks if entry in block] or blocks
        return blocks[0] if blocks else ""
    program = item.row["prompt"] + text
    code = _NO_CODE.sub("", program)
    open_braces = code.count("{") - code.count("}") if exam["closes"] else 0
    return program + "\n}" * min(max(open_braces, 0), 2)  # the stop text had closed it


def grade(pairs: Sequence[tuple[Item, str]], grading: Grading) -> list[Grade]:
    """Builds and runs each program with its tests; "unscored" where the machine lacks something."""
    grades: list[Grade | None] = [None] * len(pairs)
    jobs: dict[str, list[tuple[int, Job, str]]] = {}
    for i, (item, program) in enumerate(pairs):
        lacking = missing_for(item, grading.package_folders)
        if lacking:
            grades[i] = Grade("unscored", lacking, weak=True)
        elif not program.strip():
            grades[i] = Grade("no program", "no program in the reply", weak=True)
        else:
            name = item.row["exam"]["language"]
            nonce = secrets.token_hex(8)
            toolchain = toolchains.find(name, grading.package_folders)
            job, nonce = _job(toolchain, program, item.row["exam"]["tests"], nonce)
            jobs.setdefault(name, []).append((i, job, nonce))
    for name, numbered in jobs.items():
        toolchain = toolchains.find(name, grading.package_folders)
        verdicts = sandbox.run_many(
            [job for _, job, _ in numbered],
            toolchain.limits(grading.limits),
            allow_code_execution=grading.allow_code_execution,
            num_workers=grading.num_workers,
        )
        for (i, job, nonce), verdict in zip(numbered, verdicts, strict=True):
            grades[i] = _judge(verdict, nonce, len(job.commands))
    return [judged for judged in grades if judged is not None]


def missing_for(item: Item, package_folders: tuple[str, ...]) -> str:
    """What this machine lacks to judge an item, "" if nothing."""
    exam = item.row["exam"]
    missing = toolchains.find(exam["language"], package_folders).missing
    if missing:
        return missing
    if sandbox.working_mode() == "restricted":
        return f"{LANGUAGES[exam['language']].name}: the sandbox's mode here runs Python alone"
    for package in toolchains.packages_of(exam["language"], exam["tests"]):
        lacking = toolchains.lacking_package(exam["language"], package, package_folders)
        if lacking:
            return lacking
    return ""


def _job(toolchain: Toolchain, program: str, tests: str, nonce: str) -> tuple[Job, str]:
    tests, placed = toolchains.with_finish(toolchain.language, tests, nonce)
    job = Job(
        "",
        files={toolchain.language.file: program + "\n" + tests},
        commands=toolchain.commands(),
        folders=toolchain.folders,
        environment=dict(toolchain.environment),
    )
    return job, nonce if placed else ""


def _judge(verdict: Verdict, nonce: str, num_commands: int) -> Grade:
    seconds = round(verdict.wall_s, 4)
    lines = verdict.stdout.rstrip().splitlines()
    if verdict.status == "ok" and (not nonce or lines[-1:] == [nonce]):
        return Grade("pass", "", seconds, weak=True)
    if verdict.status == "ok":
        return Grade("error", "it ended before its tests did", seconds, weak=True)
    if verdict.status in ("timeout", "output"):
        return Grade(verdict.status, clean(verdict.reason), seconds, weak=True)
    said = [line for line in verdict.stderr.splitlines() if line.strip()]
    if num_commands > 1 and not verdict.results:
        errors = [line for line in said if "error" in line] or said
        return Grade("compile", clean(errors[0] if errors else verdict.reason), seconds, weak=True)
    broken = [line for line in said if _BROKEN.search(line)]
    if broken:
        return Grade("error", clean(broken[0]), seconds, weak=True)
    telling = [line for line in said if _FAILED.search(line)]
    if telling:
        return Grade("wrong", clean(telling[0]), seconds, weak=True)
    word = {"signal": "crash"}.get(verdict.status, verdict.status)
    return Grade(word, clean(said[0] if said else verdict.reason), seconds, weak=True)


_ROWS = (("prompt", "test"), ("prompt", "tests"))
_FORMS = {"completion": completion, "chat": chat}
MULTIPL_E = Task("multipl_e", "", _ROWS, make_item, _FORMS, extract, grade, True, "format only")
MBXP = Task("mbxp", "", _ROWS, make_item, _FORMS, extract, grade, True)
