"""Runs generated Python programs where they can do little harm.

Threat model. The program is whatever a language model wrote: wrong, wasteful, or hostile by
accident or imitation. It must not reach the network, this user's files, secrets or processes,
outlive its run, or exhaust the machine; and what it prints or how it exits must not decide whether
it passed. Someone who holds an unknown flaw of the Linux kernel is NOT kept out (no virtual machine
is used), nor is timing hidden. Each line below is a test in tests/evals/test_sandbox.py, in every
mode, as root and as a plain user.

                          modes "bubblewrap", "namespaces"        mode "restricted"
    network               empty network namespace, and seccomp    seccomp: socket() fails
    files it can read     /usr, /lib*, /bin, Python's own folder  Landlock: the same paths [1]
    files it can change   a /tmp of its own, in memory, limited   Landlock: one temporary folder,
                          to `disk_bytes`; gone with the run      removed after the run [1] [2]
    environment           empty                                   empty
    other processes       PID namespace, no /proc, and seccomp    seccomp: kill, ptrace, ... fail
    its own processes     at most `processes` (RLIMIT_NPROC)      none: fork and threads fail
    what is left behind   killed with PID 1 of the namespace      nothing can be started
    memory                `memory_bytes` a process (RLIMIT_AS)    the same
    CPU, wall clock       `cpu_s` a process, `wall_s` in all      the same
    a file's size         `file_bytes` (RLIMIT_FSIZE)             the same
    output                `output_bytes`, then it is stopped      the same
    stdin, terminal       empty, none (a session of its own)      the same
    rights                no capabilities, no new privileges      the same
    run by root           becomes uid 65534                       becomes uid 65534

    [1] Landlock 3 (Linux 6.2) is required of a plain user. Root without it still becomes uid 65534,
        which then reads what everybody may read and writes where everybody may write.
    [2] Names, sizes and times of files stay visible, and how many files it makes is limited by
        `wall_s` alone.

All processes of a program together may use `processes` times `memory_bytes`, and RLIMIT_NPROC
counts per program only since Linux 5.14 (before, all processes of the user count: fewer can be
started). A program has the standard library and no installed package.

"bubblewrap" is "namespaces" with the namespaces and the root made by bubblewrap (`bwrap`, 0.8 or
newer), and taken first where that is installed: distributions that forbid users to make namespaces
allow it by name. "namespaces" needs Linux 5.12 and either root with CAP_SYS_ADMIN or unprivileged
user namespaces; "restricted" is the fallback for containers and distributions that forbid them.
seccomp's filter exists for x86_64 and aarch64 (the latter was never run on such a machine);
elsewhere nothing runs.
Where a promise of a mode cannot be kept the program is not started at all.

A pass. `run_python` tells how a program ended, which proves nothing: `os._exit(0)` is an exit too.
`call_function` sends arguments in and takes results out as plain data (plain.py), and the caller
compares. A job with an `Exam` runs tests, as source, in a second process beside the candidate's,
with the same limits and no rights either; they call a stand-in, whose arguments and results cross
as plain data. Either way expected values and the verdict never enter the candidate's process, so
that no patched assert, `__eq__`, trace function, frame or early exit makes a pass. A program may
still special-case the arguments it sees. Other languages (`commands`) hold their own tests.

Never a fork of this process (which may run jax): `subprocess` without a preexec function.
"""

import functools
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from moejax.core.errors import InputError
from moejax.evals.sandbox_process import Job, Limits, Run, SandboxError, Verdict, remove_tree

MODES = ("bubblewrap", "namespaces", "restricted")


def require_permission(allow_code_execution: bool) -> None:
    """Raises InputError unless the caller has said that generated code may run."""
    if allow_code_execution is not True:
        raise InputError(
            "running generated code is off: pass --allow_code_execution "
            "(from Python allow_code_execution=True) to run it in a sandbox"
        )


def run_python(
    program: str,
    limits: Limits | None = None,
    *,
    allow_code_execution: bool = False,
    mode: str | None = None,
) -> Verdict:
    """Runs `program` as a script in the sandbox and says how it ended (see the module's text).

    Args:
      mode: one of MODES; None takes the strongest that works here.

    Raises:
      InputError: without allow_code_execution, or where no mode works.
    """
    return run(Job(program), limits, allow_code_execution=allow_code_execution, mode=mode)


def call_function(
    program: str,
    function: str,
    calls: Sequence[Sequence[Any]],
    limits: Limits | None = None,
    *,
    allow_code_execution: bool = False,
    mode: str | None = None,
) -> Verdict:
    """Defines `program` in the sandbox, makes `calls` of `function` and returns their results."""
    job = Job(program, function, calls)
    return run(job, limits, allow_code_execution=allow_code_execution, mode=mode)


def run(
    job: Job,
    limits: Limits | None = None,
    *,
    allow_code_execution: bool = False,
    mode: str | None = None,
) -> Verdict:
    """Runs one job; see `run_python` and `call_function`."""
    require_permission(allow_code_execution)
    if mode is not None and mode not in MODES:
        raise InputError(f"no sandbox mode {mode!r}: choose from {', '.join(MODES)}")
    return _run_patiently(mode or working_mode(), job, limits or Limits())


def run_many(
    jobs: Sequence[Job],
    limits: Limits | None = None,
    *,
    allow_code_execution: bool = False,
    num_workers: int | None = None,
) -> list[Verdict]:
    """Runs jobs side by side and returns their verdicts in order.

    By default two per core, up to 64: half of a short run is waiting for the kernel.
    """
    require_permission(allow_code_execution)
    mode, used = working_mode(), limits or Limits()
    with ThreadPoolExecutor(num_workers or min(64, 2 * (os.cpu_count() or 1))) as pool:
        return list(pool.map(lambda job: _run_patiently(mode, job, used), jobs))


@functools.cache
def working_mode() -> str:
    """The strongest mode that this machine keeps, tried once per process.

    Raises:
      InputError: none works; the text has each one's reason.
    """
    reasons = []
    for mode in MODES:
        reason = missing(mode)
        if reason is None:
            return mode
        reasons.append(f"{mode}: {reason}")
    raise InputError(f"generated code cannot be isolated on this machine ({'; '.join(reasons)})")


def missing(mode: str) -> str | None:
    """What this machine lacks for `mode`, or None if a program runs in it."""
    try:
        # Twice: an overloaded machine may not start even this in time.
        job = Job("import re, hashlib, ctypes\nprint('alive')")
        verdict = _run_patiently(mode, job, Limits(wall_s=20.0), num_tries=2)
    except SandboxError as error:
        return str(error)
    return None if verdict.stdout == "alive\n" else f"a trial program ended with {verdict.reason}"


def _run_patiently(mode: str, job: Job, limits: Limits, num_tries: int = 3) -> Verdict:
    """Tries again where the kernel was out of something for a moment: nothing had been run."""
    for _ in range(num_tries - 1):
        try:
            return _run_in(mode, job, limits)
        except SandboxError:
            time.sleep(0.5)
    return _run_in(mode, job, limits)


def _run_in(mode: str, job: Job, limits: Limits) -> Verdict:
    if mode != "restricted":
        return Run(mode, job, limits, None).finish()
    folder = tempfile.mkdtemp(prefix="moejax-sandbox-")
    try:
        return Run(mode, job, limits, folder).finish()
    finally:
        remove_tree(folder)
