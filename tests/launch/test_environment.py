"""launch/environment with a stand-in for Python: what it picks, skips, redoes and leaves alone."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "environment"
TOOLS = ("awk", "bash", "cat", "cp", "df", "dirname", "env", "flock", "head", "ls", "mkdir", "mv")
TOOLS += ("rm", "sha256sum", "touch", "uname")

# Answers what the script asks of a Python, and notes what pip is told to do.
FAKE_PYTHON = """#!/bin/bash
state=STATE
case "$*" in
    *"version_info < (3, 11)"*) exit OLD ;;
    *"import venv"*) exit NO_VENV ;;
    *version_info*) echo VERSION ;;
    *base_prefix*) echo "VERSION.1 /somewhere" ;;
    "-c import pip") exit 0 ;;
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/pyvenv.cfg" ;;
    "-m pip "*) echo "$*" >>"$state/pip.log"; [ ! -f "$state/pip_fails" ] ;;
    *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""


class Machine:
    """A PATH with the tools the script needs, and the Pythons a test puts there."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.fail(f"{tool} is missing"))
        self.env_dir = folder / "env"

    def python(self, name: str, version: str = "3.13", *, old: bool = False, venv: bool = True):
        text = FAKE_PYTHON.replace("STATE", str(self.folder)).replace("VERSION", version)
        text = text.replace("OLD", str(int(old))).replace("NO_VENV", str(int(not venv)))
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPT), *(args or (str(self.env_dir),))],
            env={"PATH": str(self.bin), **env},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def pip_calls(self) -> list[str]:
        log = self.folder / "pip.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_a_python_it_says_what_to_install(machine: Machine):
    machine.python("python3", "3.9", old=True)
    done = machine.run()
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python >= 3.11 found on PATH\n")
    for line in ("apt-get install python3 python3-venv", "dnf install", "uv python install"):
        assert line in done.stderr
    assert not machine.env_dir.exists()


def test_without_venv_it_names_the_python(machine: Machine):
    machine.python("python3", venv=False)
    done = machine.run()
    assert done.returncode == 2
    assert "bin/python3 is new enough but lacks venv" in done.stderr


def test_names_that_do_not_run_and_old_pythons_are_passed_over(machine: Machine):
    (machine.bin / "python3.13").write_text("#!/bin/bash\nexit 127\n")  # as a version manager's
    (machine.bin / "python3.13").chmod(0o755)
    machine.python("python3.12", venv=False)
    machine.python("python3", "3.11")
    done = machine.run()
    assert done.returncode == 0, done.stderr
    assert "(Python 3.11 from " in done.stderr
    assert f"--constraint {ROOT}/constraints/py311.txt --editable {ROOT}" in machine.pip_calls()[0]


def test_extras_and_plain_packages(machine: Machine):
    machine.python("python3.13")
    args = (str(machine.env_dir), "--extra", "dev", "--extra", "hf", "--plain", "a==1")
    assert machine.run(*args).returncode == 0
    first, second = machine.pip_calls()
    assert first.endswith(f"--constraint {ROOT}/constraints/py313.txt --editable {ROOT}[dev,hf]")
    assert second.endswith("--no-deps a==1")


def test_a_second_run_installs_nothing_and_another_request_installs_again(machine: Machine):
    machine.python("python3.13")
    machine.run()
    done = machine.run()
    assert (done.returncode, done.stderr, len(machine.pip_calls())) == (0, "", 1)
    (machine.env_dir / "kept").touch()
    machine.run(str(machine.env_dir), "--extra", "dev")
    assert len(machine.pip_calls()) == 2
    assert (machine.env_dir / "kept").exists()


def test_a_better_python_on_path_changes_nothing_but_a_named_one_does(machine: Machine):
    machine.python("python3", "3.11")
    machine.run()
    machine.python("python3.13", "3.13")
    assert machine.run().stderr == ""
    done = machine.run(MOEJAX_PYTHON="python3.13")
    assert "(Python 3.13 from " in done.stderr
    assert "py313.txt" in machine.pip_calls()[-1]


def test_a_named_python_that_does_not_fit_is_one_line(machine: Machine):
    machine.python("python3.13")
    done = machine.run(MOEJAX_PYTHON="/no such/python")
    assert done.returncode == 2
    assert done.stderr == (
        "error: MOEJAX_PYTHON=/no such/python is not a Python >= 3.11 with venv and ensurepip\n"
    )


def test_an_install_that_failed_is_made_anew(machine: Machine):
    machine.python("python3.13")
    (machine.folder / "pip_fails").touch()
    done = machine.run()
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: moejax: pip could not install it")
    (machine.env_dir / "half").touch()
    (machine.folder / "pip_fails").unlink()
    assert machine.run().returncode == 0
    assert not (machine.env_dir / "half").exists()
    assert machine.run().stderr == ""


def test_a_folder_of_somebody_else_is_left_alone(machine: Machine):
    machine.python("python3.13")
    machine.env_dir.mkdir()
    (machine.env_dir / "pyvenv.cfg").touch()
    done = machine.run()
    assert done.returncode == 2
    message = f"error: {machine.env_dir} exists and was not made by moejax: move it away\n"
    assert done.stderr == message
    assert [path.name for path in machine.env_dir.iterdir()] == ["pyvenv.cfg"]


def test_a_moved_environment_is_made_anew(machine: Machine):
    machine.python("python3.13")
    machine.run()
    moved = machine.folder / "elsewhere"
    machine.env_dir.rename(moved)
    (moved / "old").touch()
    assert machine.run(str(moved)).returncode == 0
    assert not (moved / "old").exists()


@pytest.mark.parametrize("args", [("env", "--extra"), ("env", "--what", "x")])
def test_wrong_use_is_told(machine: Machine, args: tuple[str, ...]):
    done = machine.run(*args)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "usage: launch/environment DIR" in done.stderr
