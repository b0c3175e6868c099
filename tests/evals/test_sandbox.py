"""Every line of the sandbox's threat model, in both modes, as root and as a plain user."""

import ast
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moejax.core.errors import InputError
from moejax.evals import sandbox

HERE = Path(__file__).parent
SOURCE = Path(sandbox.__file__).parents[1]
PLAIN_USER = 54321
CASES = [
    node.name
    for file in sorted(HERE.glob("sandbox_cases_*.py"))
    for node in ast.parse(file.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")
]
CURRENT = "root" if os.getuid() == 0 else "plain"


def _readable_by_all(path: str) -> bool:
    """Whether another user can reach and read the standard library of the Python at `path`."""
    code = (
        "import sys, os; print(sys.version_info >= (3, 11)); print(os.path.realpath(os.__file__))"
    )
    outcome = subprocess.run([path, "-I", "-S", "-c", code], capture_output=True, text=True)
    lines = outcome.stdout.split()
    if outcome.returncode or lines[:1] != ["True"]:
        return False
    wanted = [Path(lines[1]), Path(os.path.realpath(path))]
    parents = {parent for path in wanted for parent in path.parents}
    return all(p.stat().st_mode & 1 for p in parents) and all(p.stat().st_mode & 4 for p in wanted)


def _python() -> str:
    names = ["python3", *(f"python3.{minor}" for minor in (11, 12, 13, 14))]
    folders = ("/usr/bin", "/usr/local/bin")
    found = [sys.executable, *(f"{folder}/{name}" for folder in folders for name in names)]
    for path in found:
        if os.path.exists(path) and _readable_by_all(path):
            return path
    pytest.skip("no Python >= 3.11 here that another user may read")


def _path() -> str:
    """Where programs are, bubblewrap's folder too, if it is installed."""
    found = shutil.which("bwrap")
    return "/usr/bin:/bin" + (f":{os.path.dirname(found)}" if found else "")


def _package(folder: Path) -> None:
    """Copies what the cases import, so that another user can read it."""
    shutil.copytree(SOURCE / "evals", folder / "moejax" / "evals")
    (folder / "moejax" / "core").mkdir()
    for name in ("__init__.py", "core/__init__.py", "evals/__init__.py"):
        (folder / "moejax" / name).write_text("")
    shutil.copy(SOURCE / "core" / "errors.py", folder / "moejax" / "core")
    for path in HERE.glob("sandbox_*.py"):
        shutil.copy(path, folder)
    (folder / "scratch").mkdir(mode=0o777)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


@functools.cache
def _outcomes(mode: str, user: str) -> dict[str, str]:
    """Runs all cases once for one mode and user."""
    if user == "root" and CURRENT != "root":
        pytest.skip("the root half needs to be run by root")
    folder = Path(tempfile.mkdtemp(prefix="moejax-test-"))
    try:
        _package(folder)
        user_id = PLAIN_USER if (user, CURRENT) == ("plain", "root") else None
        if user_id is not None:
            os.chown(folder / "scratch", user_id, user_id)
        outcome = subprocess.run(
            [_python(), str(folder / "sandbox_cases.py"), mode],
            env={
                "PYTHONPATH": str(folder),
                "TMPDIR": str(folder / "scratch"),
                "PATH": _path(),
            },
            cwd="/",
            user=user_id,
            group=user_id,
            extra_groups=None if user_id is None else [],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert outcome.returncode == 0, outcome.stderr
        return json.loads(outcome.stdout)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("user", ["root", "plain"])
@pytest.mark.parametrize("mode", sandbox.MODES)
@pytest.mark.parametrize("case", CASES)
def test_promise(case, mode, user):
    outcome = _outcomes(mode, user)
    if outcome["missing"] is not None:
        pytest.skip(f"mode {mode!r} as {user} is not to be had here: {outcome['missing']}")
    assert outcome[case] == ""


def test_refuses_to_run_without_permission():
    for call in (
        lambda: sandbox.run_python("print(1)"),
        lambda: sandbox.run_python("print(1)", allow_code_execution=1),
        lambda: sandbox.call_function("f = abs", "f", [[1]]),
        lambda: sandbox.run_many([sandbox.Job("print(1)")]),
    ):
        with pytest.raises(InputError, match="allow_code_execution"):
            call()


def test_some_mode_works_with_this_python():
    verdict = sandbox.run_python("print('hello')", allow_code_execution=True)
    assert (verdict.status, verdict.stdout) == ("ok", "hello\n")


def test_an_unknown_mode_is_named():
    with pytest.raises(InputError, match="no sandbox mode 'docker': choose from bubblewrap"):
        sandbox.run_python("print(1)", allow_code_execution=True, mode="docker")


def test_a_prison_that_cannot_be_built_runs_nothing(monkeypatch, tmp_path):
    broken = tmp_path / "child.py"
    broken.write_text("raise SystemExit('no prison')")
    monkeypatch.setattr("moejax.evals.sandbox_process._CHILD", str(broken))
    with pytest.raises(sandbox.SandboxError, match="no prison"):
        sandbox.run_python("print(1)", allow_code_execution=True, mode="namespaces")


def test_many_programs_side_by_side_keep_their_order():
    jobs = [sandbox.Job("def f(a): return a + 1", "f", [[i]]) for i in range(12)]
    verdicts = sandbox.run_many(jobs, allow_code_execution=True, num_workers=4)
    assert [verdict.results for verdict in verdicts] == [({"value": i + 1},) for i in range(12)]


def test_the_child_shares_no_package_with_the_caller():
    """The child is started without site-packages: it must get by with the standard library."""
    for name in ("sandbox_child", "sandbox_exam", "sandbox_linux", "sandbox_seccomp", "plain"):
        tree = ast.parse((SOURCE / "evals" / f"{name}.py").read_text())
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
        own = {"plain", "sandbox_exam", "sandbox_linux", "sandbox_seccomp"}
        assert imported <= sys.stdlib_module_names | own, name
