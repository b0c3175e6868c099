"""Programs in six languages: right ones pass, mutants fail, what is missing here is said."""

import json
from pathlib import Path

import pytest

from moejax.core.errors import InputError
from moejax.evals import sandbox, toolchains
from moejax.evals.tasks import TASKS, Grading, load_items
from moejax.evals.tasks.other_code import completion, extract, grade, make_item
from moejax.evals.toolchains import LANGUAGES, with_finish

RUN = Grading(allow_code_execution=True, num_workers=2)
# MBXP's schema: prompt + completion + test. Each adds two numbers; the mutant subtracts.
MBXP = {
    "javascript": (
        "function add(a, b) {\n", "  return a + b;\n}",
        "const assert = require('assert');\nassert.deepEqual(add(1, 2), 3);\n",
        "  process.exit(0);\n}",
    ),
    "perl": (
        "sub add {\n  my ($a, $b) = @_;\n", "  return $a + $b;\n}",
        "die 'case 0 did not pass' unless add(1, 2) == 3;\n", "  exit 0;\n}",
    ),
    "cpp": (
        "#include <bits/stdc++.h>\nusing namespace std;\nint add(int a, int b) {\n",
        "  return a + b;\n}",
        "int main() {\n  if (add(1, 2) != 3) throw runtime_error(\"case 0 did not pass\");\n"
        "  return 0;\n}", "  exit(0);\n}",
    ),
}  # fmt: skip
# MultiPL-E's schema: the tests close what the prompt opened.
MULTIPL_E = {
    "java": (
        "import java.util.*;\nclass Problem {\n    public static long add(long a, long b) {\n",
        "        return a + b;",
        "    }\n    public static void main(String[] args) {\n        assert(add(1, 2) == 3);\n"
        "    }\n\n}\n", "        System.exit(0); return 0;",
    ),
    "rs": (
        "fn add(a: i64, b: i64) -> i64 {\n", "    a + b",
        "}\nfn main() {\n    let candidate = add;\n    assert_eq!(candidate(1, 2), 3);\n}\n",
        "    std::process::exit(0); #[allow(unreachable_code)] { a }",
    ),
    "php": (
        "<?php\nfunction add($a, $b) {\n", "    return $a + $b;",
        "}\nif (add(1, 2) !== 3) { throw new Exception(\"Test failed!\"); }\n", "    exit(0);",
    ),
}  # fmt: skip


def items() -> list:
    rows = [
        {"task_id": f"add_{name}/0", "prompt": row[0], "test": row[2], "language": name}
        for name, row in MBXP.items()
    ]
    rows += [
        {"name": f"add_{name}", "prompt": row[0], "tests": row[2], "language": name,
         "stop_tokens": ["\n}"]}
        for name, row in MULTIPL_E.items()
    ]  # fmt: skip
    return [make_item(row, i, "here") for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def verdicts() -> dict[str, dict[str, str]]:
    """Per language the verdict on the right program, the wrong, the leaving and the broken one."""
    texts = [row for row in (MBXP | MULTIPL_E).values()]
    kinds = {
        "right": [row[1] for row in texts],
        "wrong": [row[1].replace("+", "-") for row in texts],
        "leaving": [row[3] for row in texts],
        "broken": [row[1] + "\n(((" for row in texts],
    }
    pairs = [(item, extract(item, "completion", text)) for texts in kinds.values()
             for item, text in zip(items(), texts, strict=True)]  # fmt: skip
    grades = iter(grade(pairs, RUN))
    return {
        kind: {item.row["exam"]["language"]: next(grades) for item in items()} for kind in kinds
    }


@pytest.mark.parametrize("name", LANGUAGES)
def test_right_passes_and_nothing_else_does(verdicts, name):
    right = verdicts["right"][name]
    missing = toolchains.find(name).missing
    if missing or sandbox.working_mode() == "restricted":
        assert right.verdict == "unscored" and LANGUAGES[name].name in right.reason
        return
    assert (right.verdict, right.weak) == ("pass", True), right
    assert verdicts["wrong"][name].verdict == "wrong", verdicts["wrong"][name]
    assert verdicts["leaving"][name].verdict == "error", verdicts["leaving"][name]
    broken = verdicts["broken"][name]
    assert broken.verdict == ("compile" if len(LANGUAGES[name].commands) > 1 else "error"), broken


def test_what_a_machine_lacks_is_named_and_not_scored_as_wrong():
    rows = [
        {"prompt": "", "test": "const _ = require('no-such-package')\n", "language": "javascript"},
        {"prompt": "", "test": "use No::Such::Module;\n", "language": "perl"},
    ]
    pairs = [(make_item(row, i, "here"), "1;") for i, row in enumerate(rows)]
    for (item, _), judged in zip(pairs, grade(pairs, RUN), strict=True):
        assert judged.verdict == "unscored"
        name = item.row["exam"]["language"]
        if not toolchains.find(name).missing and sandbox.working_mode() != "restricted":
            package = {"javascript": "no-such-package", "perl": "No::Such::Module"}[name]
            assert f"package {package} is not installed" in judged.reason


def test_toolchains_are_reported_by_name():
    report = toolchains.report()
    assert set(report) == set(LANGUAGES) and all(report.values())


def test_an_unknown_language_is_named():
    with pytest.raises(InputError, match="row 3: no language 'cobol' here; there are javascript"):
        make_item({"prompt": "", "test": "", "language": "cobol"}, 0, "row 3")


def test_a_generated_function_is_closed_again():
    item = items()[2]
    assert completion(item).stop == ("\n}\n",)
    assert extract(item, "completion", "  return a + b;").endswith("return a + b;\n}")
    reply = "Sure:\n```cpp\nint add(int a, int b) { return a; }\n```\nDone."
    assert extract(item, "chat", reply) == "int add(int a, int b) { return a; }\n"


def test_the_end_of_the_tests_is_told():
    for name, row in (MBXP | MULTIPL_E).items():
        language = LANGUAGES[toolchains.language_of(name)]
        text, placed = with_finish(language, row[2], "xyz")
        assert placed and '"xyz"' in text
    assert with_finish(LANGUAGES["cpp"], "no brace", "xyz") == ("no brace", False)


@pytest.mark.parametrize("language", ["javascript", "perl"])
def test_the_written_solutions_and_their_mutants_go_together(language, tmp_path):
    """They answer HumanEval in this language; BUILD.md has the command that judges them."""
    folder = Path(__file__).parent
    good, bad = (
        [json.loads(line) for line in (folder / f"humaneval_{language}{kind}.jsonl").open()]
        for kind in ("", "_mutants")
    )
    assert len(good) >= 20 and [r["task_id"] for r in good] == [r["task_id"] for r in bad]
    assert all(a["completion"] != b["completion"] for a, b in zip(good, bad, strict=True))


def test_a_row_without_tests_is_named(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": "x", "language": "cpp"}\n')
    with pytest.raises(InputError, match="not a problem of mbxp: 'test' missing"):
        load_items(TASKS["mbxp"], str(path))
