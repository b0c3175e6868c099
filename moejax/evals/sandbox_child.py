"""The sandbox's other side: started as `python -I -S sandbox_child.py REPORT_FD RESULT_FD`.

Three processes, of which only the last ever sees the program:

    this one    reads the job, builds the prison, waits
    supervisor  PID 1 of the namespace; ends everything at the time limit, at the program's end, or
                when the caller's end of stdin closes (the caller's death included); reports
    candidate   sets its limits, gives up every right, runs the program

Without namespaces the first is the supervisor. What each step is for: sandbox.py.
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


def _read_only_paths() -> list[str]:
    return [*linux.SYSTEM_FOLDERS, sys.base_prefix, sys.base_exec_prefix]


def _supervise(job: dict, report_fd: int, result_fd: int) -> None:
    """Runs the candidate under its time limit, reports its end and never returns."""
    ready_read, ready_write = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(ready_read)
        _be_candidate(job, report_fd, result_fd, ready_write)
    os.close(ready_write)
    ready = os.read(ready_read, 4096)  # b"" if it died; else "ok" or why the prison failed
    if ready != b"ok":
        text = ready.decode(errors="replace") or "the candidate died while setting its limits"
        _write_line(report_fd, {"setup_error": text})
        os._exit(1)
    record: dict = {"started_s": time.monotonic() - started}
    pidfd = os.pidfd_open(child)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(0, 0)  # only its hang-up is of interest
    deadline = time.monotonic() + job["limits"]["wall_s"]
    events = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    if not any(fd == pidfd for fd, _ in events):
        record["stopped"] = "caller" if events else "wall"
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    record |= {"exit_code": code, "cpu_s": usage.ru_utime + usage.ru_stime}
    record["max_memory_bytes"] = usage.ru_maxrss * 1024
    _write_line(report_fd, record)
    os._exit(0)  # as PID 1 of its namespace, this kills every process left in it


def _set_limits(limits: dict) -> None:
    cpu = max(1, int(limits["cpu_s"]))
    values = {
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (limits["memory_bytes"],) * 2,
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
    namespaces, was_root = job["mode"] == "namespaces", os.geteuid() == 0
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
        count += 2  # the other two processes have the same user and count too
    if not namespaces:
        os.chdir(job["folder"])
        if not was_root or linux.landlock_version() >= 3:
            linux.restrict_files(_read_only_paths(), [job["folder"]])
    _set_limits(job["limits"])
    resource.setrlimit(resource.RLIMIT_NPROC, (count, count))
    linux.drop_capabilities()
    seccomp.install(processes=namespaces)


def _be_candidate(job: dict, report_fd: int, result_fd: int, ready_fd: int) -> None:
    code = 1
    try:
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.close(report_fd)
        try:
            _lock_up(job)
        except OSError as error:
            os.write(ready_fd, str(error).encode()[:4000])
            os._exit(1)
        os.write(ready_fd, b"ok")
        for fd in range(3, 256):
            if fd != result_fd:
                try:
                    os.close(fd)
                except OSError:
                    continue
        code = _run(job, result_fd)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # whatever the program throws, it must not fall through to the caller
        traceback.print_exc()
    finally:
        os._exit(code)


def _run(job: dict, result_fd: int) -> int:
    """Executes the program as a module; then, if a function is named, makes the calls."""
    module = types.ModuleType("__main__" if job["function"] is None else "candidate")
    sys.modules[module.__name__] = module
    try:
        exec(compile(job["program"], "<program>", "exec"), module.__dict__)  # noqa: S102
    except SystemExit as stop:
        if job["function"] is None:
            return _exit_code(stop)
        traceback.print_exc()
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    if job["function"] is None:
        return 0
    function = getattr(module, job["function"], None)
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
    if job["mode"] == "restricted":
        _supervise(job, report_fd, result_fd)
    try:
        flags = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWNET
        flags |= linux.CLONE_NEWIPC | linux.CLONE_NEWUTS
        if os.geteuid() != 0:
            flags |= linux.CLONE_NEWUSER
        linux.enter_namespaces(flags)
        linux.enter_root(_read_only_paths(), job["limits"]["disk_bytes"])
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
