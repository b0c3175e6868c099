"""One function per promise of moejax/evals/sandbox.py, run as `python sandbox_cases.py MODE`.

A program of its own, so that the same cases run as root and as a plain user. Prints one JSON object
{case: "" or what went wrong}. Needs the standard library and moejax.evals.sandbox alone.
"""

import json
import os
import traceback
from concurrent.futures import ThreadPoolExecutor

import sandbox_cases_escape
import sandbox_cases_exam
import sandbox_cases_limits
from sandbox_box import MODE

from moejax.evals import sandbox

# These look at all children, or all temporary files, of this process.
ALONE = (
    "case_nothing_is_left_behind",
    "case_temporary_folder_is_removed",
    "case_fork_bomb",
    "case_zombies",
)


def outcome_of(case) -> str:
    try:
        case()
    except Exception:  # reported, not swallowed: the caller's test fails with it
        return traceback.format_exc()
    return ""


def main() -> None:
    os.umask(0o022)
    outcome = {"missing": sandbox.missing(MODE)}
    if outcome["missing"] is None:
        modules = (sandbox_cases_limits, sandbox_cases_escape, sandbox_cases_exam)
        everything = {name: case for module in modules for name, case in vars(module).items()}
        cases = {name: case for name, case in everything.items() if name.startswith("case_")}
        shared = [name for name in cases if name not in ALONE]
        with ThreadPoolExecutor(4) as pool:
            together = pool.map(lambda name: outcome_of(cases[name]), shared)
            outcome |= dict(zip(shared, together, strict=True))
        outcome |= {name: outcome_of(cases[name]) for name in ALONE}
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
