"""One run of the sandbox's child: the process, its pipes, and how it ended."""

import contextlib
import dataclasses
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.evals import plain, sandbox_bubblewrap

_CHILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox_child.py")
_START_S = 20.0  # for a loaded machine to start the child, before its own clock runs


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use; times in seconds, sizes in bytes.

    Without `address_space`, `memory_bytes` bounds what a process may write to (RLIMIT_DATA) and not
    all it maps (RLIMIT_AS): JavaScript's and Java's machines reserve far more than they use.
    """

    wall_s: float = 5.0
    cpu_s: int = 4
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    processes: int = 8
    open_files: int = 64
    address_space: bool = True


@dataclasses.dataclass(frozen=True)
class Exam:
    """Python tests that run in a process of their own.

    Attributes:
      test: source; it calls `candidate`, and the functions by their names.
      names: functions of the program that the tests call; `candidate` is the first.
      setup: source that the tests need and the program need not have.
    """

    test: str
    names: Sequence[str]
    setup: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
    """A program, and what to do with it: run it, make calls of a function, or hold an exam.

    Attributes:
      program: Python source, unless `commands` say otherwise.
      function: the function that `calls` are made of.
      calls: lists of arguments.
      exam: tests in a second process; `results` is ({"value": True},) if all of them held.
      packages: folders with packages that program and tests may import.
      files: further files to write into the program's folder, by name.
      commands: run these instead of Python, one after another while they succeed; {} in an
        argument stands for the program's folder.
      folders: what the commands need to read besides the system's folders.
      environment: of the commands.
    """

    program: str
    function: str | None = None
    calls: Sequence[Sequence[Any]] = ()
    exam: Exam | None = None
    packages: Sequence[str] = ()
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    commands: Sequence[Sequence[str]] = ()
    folders: Sequence[str] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a program ended; `exit_code` is negative for a signal, as in subprocess.

    `status` is "ok" (exit code 0), "error" (another), "signal", "timeout" or "output" (too much);
    `reason` says it in a few words. `results` has one entry per call that came back:
    {"value": plain data} or {"error": text}.
    """

    status: str
    reason: str
    exit_code: int | None
    stdout: str
    stderr: str
    wall_s: float
    mode: str
    results: tuple[dict[str, Any], ...] = ()


class SandboxError(RuntimeError):
    """The prison could not be built, so nothing was run."""


class Run:
    """One child process: its pipes, what came out of them, its end."""

    def __init__(self, mode: str, job: Job, limits: Limits, folder: str | None) -> None:
        self.mode, self.limits, self.started = mode, limits, time.monotonic()
        calls = [[plain.encode(value) for value in call] for call in job.calls]
        record = {
            "mode": mode,
            "program": job.program,
            "function": job.function,
            "calls": calls,
            "folder": folder,
            "limits": dataclasses.asdict(limits),
            "exam": job.exam is not None,
            "packages": list(job.packages),
            "files": dict(job.files),
            "commands": [list(command) for command in job.commands],
            "folders": list(job.folders),
            "environment": dict(job.environment),
        }
        if job.exam is not None:
            record["function"] = job.exam.names[0]
        messages = [record] + ([dataclasses.asdict(job.exam)] if job.exam is not None else [])
        report_read, report_write = os.pipe()
        result_read, result_write = os.pipe()
        try:
            # -S: no site-packages. -I: no environment, no current folder. -B: writes no bytecode.
            python, child, around = sys.executable, _CHILD, []
            if mode == "bubblewrap":
                around = _bubblewrap([*job.packages, *job.folders], limits.disk_bytes)
                # A virtual environment's own path does not exist inside: what it stands on does.
                python, child = (
                    os.path.realpath(python),
                    f"{sandbox_bubblewrap.FOLDER}/sandbox_child.py",
                )
            self.process = subprocess.Popen(
                [*around, python, "-I", "-S", "-B", child, str(report_write), str(result_write)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(report_write, result_write),
                env={},
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(report_write)
            os.close(result_write)
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.outputs = {
            "stdout": self.process.stdout.fileno(),
            "stderr": self.process.stderr.fileno(),
            "report": report_read,
            "result": result_read,
        }
        self.data = {name: bytearray() for name in self.outputs}
        self.overflow = ""
        with contextlib.suppress(BrokenPipeError):  # if it died at once, no report says so
            for message in map(json.dumps, messages):
                data = message.encode()
                self.process.stdin.write(len(data).to_bytes(8, "big") + data)
            self.process.stdin.flush()

    def finish(self) -> Verdict:
        """Waits for the end, then makes sure of it."""
        try:
            self._read_all()
        finally:
            self._stop()
        return self._verdict()

    def _stop(self) -> None:
        assert self.process.stdin and self.process.stdout and self.process.stderr
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # tells the supervisor to end everything
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()
        os.close(self.outputs["report"])
        os.close(self.outputs["result"])

    def _read_all(self) -> None:
        """Reads every pipe to its end, keeps at most `output_bytes` of each, and stops a flood."""
        deadline = self.started + self.limits.wall_s + _START_S
        with selectors.DefaultSelector() as selector:
            for name, fd in self.outputs.items():
                selector.register(fd, selectors.EVENT_READ, name)
            while selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                for key, _ in selector.select(left):
                    part = os.read(key.fd, 1 << 16)
                    if not part:
                        selector.unregister(key.fd)
                    self._keep(key.data, part)
                if self.overflow:
                    return

    def _keep(self, name: str, part: bytes) -> None:
        room = self.limits.output_bytes - len(self.data[name])
        self.data[name] += part[:room]
        if len(part) > room:
            self.overflow = name

    def _verdict(self) -> Verdict:
        reports = [json.loads(line) for line in self.data["report"].splitlines()]
        report = reports[0] if reports else {}
        stdout, stderr = (self.data[name].decode(errors="replace") for name in ("stdout", "stderr"))
        if "setup_error" in report:
            raise SandboxError(report["setup_error"])
        if not report and not self.overflow:
            tail = stderr.strip().splitlines()[-1:] or ["no word from it"]
            raise SandboxError(f"the sandbox's child failed: {tail[0]}")
        code = report.get("exit_code")
        status, reason = self._status(report, code, stderr)
        wall_s = time.monotonic() - self.started
        results = _parse_results(bytes(self.data["result"]))
        return Verdict(status, reason, code, stdout, stderr, wall_s, self.mode, results)

    def _status(self, report: dict, code: int | None, stderr: str) -> tuple[str, str]:
        if self.overflow:
            return "output", f"more than {self.limits.output_bytes} bytes on {self.overflow}"
        if report.get("stopped") == "wall":
            return "timeout", f"longer than {self.limits.wall_s:g} s"
        if report.get("stopped") == "tests" or (report.get("early") and code == 0):
            return "error", "it stopped answering before the tests were done"
        if code == 0:
            return "ok", "exit code 0"
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return "timeout", f"more than {self.limits.cpu_s} s of CPU time, or killed"
        if code is not None and code < 0:
            return "signal", signal.Signals(-code).name
        lines = stderr.strip().splitlines()
        return "error", lines[-1][:200] if lines else f"exit code {code}"


def _bubblewrap(read_only: Sequence[str], disk_bytes: int) -> list[str]:
    try:
        return sandbox_bubblewrap.command(read_only, disk_bytes)
    except OSError as error:
        raise SandboxError(str(error)) from error


def _parse_results(data: bytes) -> tuple[dict[str, Any], ...]:
    """Reads the result lines, which a hostile program may have written: bad ones become errors."""
    results = []
    for line in data.splitlines():
        try:
            record = json.loads(line)
            if isinstance(record, dict) and "value" in record:
                results.append({"value": plain.decode(record["value"])})
            else:
                results.append({"error": str(record["error"])[:500]})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            results.append({"error": f"unreadable result: {type(error).__name__}"})
    return tuple(results)


def remove_tree(folder: str) -> None:
    """Removes `folder` whatever modes the folders in it have; follows no link."""
    for parent, _, _ in os.walk(folder, topdown=True, onerror=None):
        for entry in os.scandir(parent):
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
