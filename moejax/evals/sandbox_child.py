"""The sandbox's other side: started as `python -I -S sandbox_child.py REPORT_FD RESULT_FD`.

Four processes, of which only the candidate ever sees the program:

    this one    reads the job, builds the prison, waits
    supervisor  PID 1 of the namespace; ends everything at the time limit, at the program's end, or
                when the caller's end of stdin closes (the caller's death included); reports
    candidate   sets its limits, gives up every right, runs the program
    tests       (of an exam) the same limits and rights; reads the tests itself, so that they were
                never in the memory of another process, and asks the candidate through pipes

Without namespaces of its own, or inside those that bubblewrap made, the first is the supervisor.
What each step is for: sandbox.py.
"""

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
import types

# -I leaves this folder off the path; it is taken off again before the program runs.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import plain  # noqa: E402
import sandbox_exam as exam  # noqa: E402
import sandbox_linux as linux  # noqa: E402
import sandbox_seccomp as seccomp  # noqa: E402

del sys.path[0]

NOBODY = 65534
_MAX_RESULT_CHARS = 100_000


def _read_job() -> dict:
    """Reads one length-prefixed JSON object and leaves stdin open: its closing means stop."""
    size = int.from_bytes(_read_exactly(8), "big")
    return json.loads(_read_exactly(size))


def _read_exactly(size: int) -> bytes:
    parts = []
    while size:
        part = os.read(0, min(size, 1 << 20))
        if not part:
            os._exit(1)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write_line(fd: int, record: dict) -> None:
    data = (json.dumps(record) + "\n").encode()
    while data:
        data = data[os.write(fd, data) :]


def _read_only_paths(job: dict) -> list[str]:
    python = [sys.base_prefix, sys.base_exec_prefix]
    return [*linux.SYSTEM_FOLDERS, *python, *job["packages"], *job["folders"]]


def _supervise(job: dict, report_fd: int, result_fd: int) -> None:
    """Runs the candidate (and the tests) under the time limit, reports the end, never returns."""
    started = time.monotonic()
    pipes = (*os.pipe(), *os.pipe()) if job["exam"] else ()
    call_read, call_write, reply_read, reply_write = pipes or (-1, -1, -1, -1)
    # The tests are not read here: they enter their own process alone.
    candidate, ready = _start(
        lambda ready_fd: _be_candidate(job, result_fd, call_read, reply_write, ready_fd)
    )
    main, waiting = candidate, [ready]
    if job["exam"]:
        main, ready = _start(
            lambda ready_fd: _be_tests(job, result_fd, call_write, reply_read, ready_fd)
        )
        waiting.append(ready)
    for fd in pipes:
        os.close(fd)
    for ready_read in waiting:
        said = os.read(ready_read, 4096)  # b"" if it died; else "ok" or why the prison failed
        if said != b"ok":
            text = said.decode(errors="replace") or "a process died while setting its limits"
            _write_line(report_fd, {"setup_error": text})
            os._exit(1)
    record: dict = {"started_s": time.monotonic() - started}
    poll = select.poll()
    poll.register(os.pidfd_open(main), select.POLLIN)
    poll.register(0, 0)  # only its hang-up is of interest
    deadline = time.monotonic() + job["limits"]["wall_s"]
    events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    if not any(fd != 0 for fd, _ in events):
        record["stopped"] = "caller" if events else "wall"
        os.kill(main, signal.SIGKILL)
    code, cpu_s, memory = _wait(main)
    if main != candidate:
        told = code == 0
        if not told and not _ends_within(candidate, 0.5):
            record.setdefault("stopped", "tests")
        if told or "stopped" in record:
            os.kill(candidate, signal.SIGKILL)
        ended, cpu_s, memory = _wait(candidate)
        if not told:
            record["early"], code = code == 3, ended if code == 3 else code
    record |= {"exit_code": code, "cpu_s": cpu_s, "max_memory_bytes": memory}
    _write_line(report_fd, record)
    os._exit(0)  # as PID 1 of its namespace, this kills every process left in it


def _start(body) -> tuple[int, int]:
    """Forks a process for `body(ready_fd)`; returns its id and where it says that it is ready."""
    ready_read, ready_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready_read)
        body(ready_write)
    os.close(ready_write)
    return child, ready_read


def _wait(child: int) -> tuple[int, float, int]:
    _, status, usage = os.wait4(child, 0)
    cpu_s = usage.ru_utime + usage.ru_stime
    return os.waitstatus_to_exitcode(status), cpu_s, usage.ru_maxrss * 1024


def _ends_within(child: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(os.pidfd_open(child), select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _set_limits(limits: dict) -> None:
    cpu = max(1, int(limits["cpu_s"]))
    values = {
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS if limits["address_space"] else resource.RLIMIT_DATA: (
            limits["memory_bytes"],
        )
        * 2,
        resource.RLIMIT_FSIZE: (limits["file_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (limits["open_files"],) * 2,
        resource.RLIMIT_MEMLOCK: (0, 0),
    }
    for kind, (soft, hard) in values.items():
        _, highest = resource.getrlimit(kind)
        if highest != resource.RLIM_INFINITY:
            soft, hard = min(soft, highest), min(hard, highest)
        resource.setrlimit(kind, (soft, hard))


def _lock_up(job: dict) -> None:
    """Gives up every right this process has; raises OSError where the kernel does not agree."""
    namespaces, was_root = job["mode"] != "restricted", os.geteuid() == 0
    linux.die_with_parent()
    count = job["limits"]["processes"]
    if was_root:
        if not namespaces:
            os.chown(job["folder"], NOBODY, NOBODY)
        linux.become(NOBODY)
        if namespaces:
            with contextlib.suppress(OSError):  # else all programs of this user count together
                linux.own_process_count()
        if not os.path.isfile(os.__file__):  # then nothing could be imported
            raise OSError(f"uid {NOBODY} cannot read {os.__file__}: put Python where all can read")
        linux.die_with_parent()  # a change of user had cleared it
    else:
        count += (
            1 + (job["mode"] == "namespaces") + job["exam"]
        )  # the sandbox's other processes have the same user and count too
    if not namespaces:
        os.chdir(job["folder"])
        if not was_root or linux.landlock_version() >= 3:
            linux.restrict_files(_read_only_paths(job), [job["folder"]])
    _set_limits(job["limits"])
    resource.setrlimit(resource.RLIMIT_NPROC, (count, count))
    linux.drop_capabilities()
    seccomp.install(processes=namespaces, modes=namespaces and bool(job["commands"]))


def _enter(job: dict, keep: tuple[int, ...], ready_fd: int) -> None:
    """Locks this process up, says so, and closes every file but those of `keep`."""
    try:
        _lock_up(job)
    except OSError as error:
        os.write(ready_fd, str(error).encode()[:4000])
        os._exit(1)
    os.write(ready_fd, b"ok")
    for fd in range(3, 256):
        if fd not in keep:
            with contextlib.suppress(OSError):
                os.close(fd)
    if job["packages"]:
        # One thread each: a thread per core of every library would exceed `processes`.
        for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
            os.putenv(name, "1")
        sys.path += job["packages"]


def _null(*fds: int) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for fd in fds:
        os.dup2(null, fd)


def _be_tests(job: dict, result_fd: int, call_fd: int, reply_fd: int, ready_fd: int) -> None:
    code = 1
    try:
        tests = _read_job()
        _null(0, 1, 2)
        _enter(job, (result_fd, call_fd, reply_fd), ready_fd)
        _write_line(result_fd, exam.run_tests(tests, call_fd, reply_fd))
        code = 0
    finally:
        os._exit(code)


def _be_candidate(job: dict, result_fd: int, call_fd: int, reply_fd: int, ready_fd: int) -> None:
    code = 1
    try:
        _null(0)
        keep = (call_fd, reply_fd) if job["exam"] else (result_fd,)
        _enter(job, keep, ready_fd)
        if job["commands"]:
            code = _run_commands(job, result_fd)
        elif job["exam"]:
            module = _define(job, "candidate")
            if module is not None:
                code = exam.answer_calls(module, job["function"], call_fd, reply_fd)
        else:
            code = _run(job, result_fd)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # whatever the program throws, it must not fall through to the caller
        traceback.print_exc()
    finally:
        os._exit(code)


def _run_commands(job: dict, result_fd: int) -> int:
    """Runs the commands one after another; tells on `result_fd` that the last one is reached."""
    folder = os.getcwd()
    for name, text in job["files"].items():
        with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
    *before, last = [
        [part.replace("{}", folder) for part in command] for command in job["commands"]
    ]
    for command in before:
        child = os.fork()
        if child == 0:
            os.close(result_fd)
            os.execve(command[0], command, job["environment"])
        code, _, _ = _wait(child)
        if code:
            return code if code > 0 else 128 - code
    _write_line(result_fd, {"value": "reached"})
    os.close(result_fd)
    os.execve(last[0], last, job["environment"])
    return 127  # not reached: execve does not return


def _define(job: dict, name: str) -> types.ModuleType | None:
    """Executes the program as a module; None, with the traceback on stderr, if that fails."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    try:
        exec(compile(job["program"], "<program>", "exec"), module.__dict__)  # noqa: S102
    except BaseException:
        traceback.print_exc()
        return None
    return module


def _run(job: dict, result_fd: int) -> int:
    """Runs the program; or defines it, if a function is named, and makes the calls."""
    if job["function"] is None:
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        try:
            exec(compile(job["program"], "<program>", "exec"), module.__dict__)  # noqa: S102
        except SystemExit as stop:
            return _exit_code(stop)
        except BaseException:
            traceback.print_exc()
            return 1
        return 0
    found = _define(job, "candidate")
    if found is None:
        return 1
    function = getattr(found, job["function"], None)
    if not callable(function):
        _write_line(result_fd, {"missing": job["function"]})
        return 1
    for arguments in job["calls"]:
        _write_line(result_fd, _call(function, arguments))
    return 0


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return (stop.code or 0) & 255
    print(stop.code, file=sys.stderr)
    return 1


def _call(function: object, arguments: list) -> dict:
    try:
        value = function(*[plain.decode(argument) for argument in arguments])  # type: ignore[operator]
        record = {"value": plain.encode(value)}
        text = json.dumps(record)
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return record if len(text) <= _MAX_RESULT_CHARS else {"error": "the result is too long"}


def main() -> None:
    report_fd, result_fd = int(sys.argv[1]), int(sys.argv[2])
    job = _read_job()
    if job["mode"] != "namespaces":
        _supervise(job, report_fd, result_fd)
    try:
        flags = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWNET
        flags |= linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
        if os.geteuid() != 0:
            flags |= linux.CLONE_NEWUSER
        linux.enter_namespaces(flags)
        linux.enter_root(_read_only_paths(job), job["limits"]["disk_bytes"])
    except OSError as error:
        _write_line(report_fd, {"setup_error": str(error)})
        os._exit(1)
    supervisor = os.fork()
    if supervisor == 0:
        linux.die_with_parent()
        _supervise(job, report_fd, result_fd)
    os.close(report_fd)
    os.close(result_fd)
    os.waitpid(supervisor, 0)
    os._exit(0)


if __name__ == "__main__":
    main()
