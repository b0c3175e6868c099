"""Canonical solutions pass, wrong ones fail: every set that is here, judged whole.

  python -m tests.evals.measure_sets DATA [--only=cpp] [--num=100] [--package_folders=A,B]

DATA holds HumanEval.jsonl.gz, mbpp.jsonl, mbxp_cpp.jsonl and gsm8k_model_solutions.jsonl.
JavaScript and Perl have no canonical solutions in their sets: those written for it lie beside this
file (tasks/), and their tests need lodash and Data::Compare (--package_folders).

The wrong ones are built so that none can be right by chance: a Python function that leaves the
process before its tests are done, or answers with a value of its own kind; a C++ function whose
right answer is spoilt on the way out (+ 1, not, one element more); mutants written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from moejax.evals.sandbox import Limits
from moejax.evals.tasks import TASKS, Grade, Grading, Item, load_items

HERE = Path(__file__).parent / "tasks"
Pairs = list[tuple[Item, str]]

# Whatever a C++ function answers, something else of the same type.
_SPOIL = """
template <class T> struct Spoil { static T of(T x) { return x + 1; } };
template <> struct Spoil<bool> { static bool of(bool x) { return !x; } };
template <> struct Spoil<string> { static string of(string x) { return x + "?"; } };
template <class T> struct Spoil<vector<T>> {
  static vector<T> of(vector<T> x) { x.push_back(T()); return x; }
};
template <class K, class V> struct Spoil<unordered_map<K, V>> {
  static unordered_map<K, V> of(unordered_map<K, V> x) {
    if (x.empty()) x[K()] = V(); else x.clear();
    return x;
  }
};
template <class... A> auto NAME_spoilt(A... a) {
  auto right = NAME_right(a...);
  return Spoil<decltype(right)>::of(right);
}
#define NAME NAME_spoilt  // a macro: between a template and std::gcd, C++ takes the latter
"""


def python_pairs(data: Path, wrong: bool) -> tuple[Pairs, Pairs]:
    """HumanEval's and MBPP's solutions, or functions that leave or answer with nonsense."""
    humaneval = load_items(TASKS["humaneval"], str(data / "HumanEval.jsonl.gz"))
    mbpp = load_items(TASKS["mbpp"], str(data / "mbpp.jsonl"))
    if not wrong:
        right = [
            [
                (item, item.row.get("code") or item.row["prompt"] + item.row["canonical_solution"])
                for item in items
            ]
            for items in (humaneval, mbpp)
        ]
        return right[0], right[1]
    bodies = ("import os; os._exit(0)", "return None")
    leaving = [
        (item, f"def {item.row['entry_point']}(*a, **k):\n    {body}\n")
        for item in humaneval
        for body in bodies
    ]
    constant = "def {}(*a, **k):\n    return 'nonsense'"
    return leaving, [
        (item, "\n".join(map(constant.format, item.row["exam"]["names"]))) for item in mbpp
    ]


def cpp_pairs(data: Path, wrong: bool) -> Pairs:
    """MBXP's canonical C++ solutions, or the same with a spoilt answer."""
    items = load_items(TASKS["mbxp"], str(data / "mbxp_cpp.jsonl"))
    pairs = []
    for item in items:
        solution, name = item.row.get("canonical_solution"), item.row["entry_point"]
        if not solution:
            continue
        program = item.row["prompt"] + solution
        if wrong:
            renamed = re.sub(rf"\b{name}\s*\(", f"{name}_right(", program)
            program = renamed + "\n" + _SPOIL.replace("NAME", name)
        pairs.append((item, program))
    return pairs


def written(name: str, wrong: bool) -> dict[str, str]:
    """Solutions written for a set without its own, or their mutants, by task."""
    lines = (HERE / f"{name}{'_mutants' * wrong}.jsonl").read_text().splitlines()
    return {row["task_id"]: row["completion"] for row in map(json.loads, lines)}


def sets(data: Path) -> Iterator[tuple[str, str, Pairs, bool]]:
    """(what, task, programs, whether they are right)."""
    for wrong in (False, True):
        word = "wrong" if wrong else "right"
        humaneval, mbpp = python_pairs(data, wrong)
        yield f"humaneval {word}", "humaneval", humaneval, not wrong
        yield f"mbpp {word}", "mbpp", mbpp, not wrong
        for language in ("javascript", "perl"):
            texts = written(f"humaneval_{language}", wrong)
            items = load_items(TASKS["mbxp"], str(data / f"humaneval_{language}.jsonl"))
            pairs = [
                (item, TASKS["mbxp"].extract(item, "completion", texts[item.id]))
                for item in items
                if item.id in texts
            ]
            yield f"{language} {word}", "mbxp", pairs, not wrong
        yield f"cpp {word}", "mbxp", cpp_pairs(data, wrong), not wrong


def judge(task: str, pairs: Sequence[tuple[Item, str]], grading: Grading) -> list[Grade]:
    """Verdicts, in order."""
    return TASKS[task].grade(pairs, grading)


def gsm8k(data: Path) -> tuple[int, int]:
    """How many of four models' solutions get the verdict that was published, and of how many."""
    task, agree, total = TASKS["gsm8k"], 0, 0
    rows = (data / "gsm8k_model_solutions.jsonl").read_text("utf-8").splitlines()
    for number, row in enumerate(map(json.loads, rows)):
        answer = row.get("ground_truth") or row["answer"]
        item = task.make({"question": row["question"], "answer": answer}, number, "here")
        found = [value for value in row.values() if isinstance(value, dict) and "solution" in value]
        grades = task.grade([(item, one["solution"]) for one in found], Grading())
        agree += sum(g.passed == one["is_correct"] for g, one in zip(grades, found, strict=True))
        total += len(found)
    return agree, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--num", type=int, default=None)
    parser.add_argument("--package_folders", default="")
    flags = parser.parse_args()
    folders = tuple(filter(None, flags.package_folders.split(",")))
    # launch.evaluate's limits
    grading = Grading(Limits(wall_s=15.0, cpu_s=5), folders, allow_code_execution=True)
    if re.search(flags.only, "gsm8k"):
        agree, total = gsm8k(flags.data)
        print(f"gsm8k: {agree} of {total} verdicts are the published ones", flush=True)
    for what, task, pairs, right in sets(flags.data):
        if not re.search(flags.only, what):
            continue
        pairs = pairs[: flags.num]
        grades = judge(task, pairs, grading)
        words = dict(Counter(grade.verdict for grade in grades))
        print(f"{what}: {words.get('pass', 0)} of {len(pairs)} pass; {words}", flush=True)
        odd = [(pair[0].id, g) for pair, g in zip(pairs, grades, strict=True) if g.passed != right]
        for name, grade in odd[:12]:
            print(f"  {name}: {grade.verdict} {grade.reason[:100]}", flush=True)


if __name__ == "__main__":
    main()
