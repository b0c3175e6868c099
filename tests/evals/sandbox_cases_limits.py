"""Programs that ask for too much, and what comes back of a program."""

import os
import signal

from sandbox_box import MODE, call, run


def case_a_program_runs_and_its_end_is_told():
    verdict = run("import sys\nprint('out')\nprint('err', file=sys.stderr)")
    assert (verdict.status, verdict.exit_code) == ("ok", 0), verdict
    assert (verdict.stdout, verdict.stderr, verdict.mode) == ("out\n", "err\n", MODE)
    assert run("raise SystemExit(3)").exit_code == 3
    verdict = run("1/0")
    assert (verdict.status, verdict.exit_code) == ("error", 1)
    assert "division by zero" in verdict.reason
    assert run("def broken(:").status == "error"
    assert run("import ctypes\nctypes.string_at(0)").status == "signal"


def case_the_standard_library_is_there():
    verdict = run(
        "import bisect, collections, datetime, decimal, functools, hashlib, heapq, itertools, json,"
        " math, operator, random, re, statistics, string, typing, tempfile\n"
        "with tempfile.TemporaryFile() as file: file.write(b'x')\nprint(hashlib.md5(b'').name)"
    )
    assert verdict.stdout == "md5\n", verdict


def case_endless_loop():
    verdict = run("while True: pass", wall_s=1.0, cpu_s=30)
    assert verdict.status == "timeout" and verdict.wall_s < 5, verdict
    verdict = run("import time\ntime.sleep(1000)", wall_s=1.0)
    assert verdict.status == "timeout" and verdict.wall_s < 5, verdict


def case_cpu_time():
    verdict = run("while True: pass", wall_s=20.0, cpu_s=1)
    assert verdict.status == "timeout" and verdict.exit_code == -signal.SIGXCPU, verdict


def case_ignored_signals():
    program = (
        "import signal\nfor number in range(1, 65):\n"
        "    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "while True: pass"
    )
    verdict = run(program, wall_s=20.0, cpu_s=1)
    assert verdict.status == "timeout" and verdict.exit_code == -signal.SIGKILL, verdict
    assert run(program, wall_s=0.5, cpu_s=30).status == "timeout"


def case_memory_bomb():
    verdict = run("x = bytearray(1 << 32)", memory_bytes=256 << 20)
    assert verdict.status == "error" and verdict.reason == "MemoryError", verdict
    verdict = run("x = []\nwhile True: x.append(bytes(1 << 20))", memory_bytes=256 << 20)
    assert verdict.status == "error" and "MemoryError" in verdict.reason, verdict
    verdict = run("import mmap\nmmap.mmap(-1, 1 << 32)", memory_bytes=256 << 20)
    assert verdict.status == "error", verdict


def case_output_flood():
    for stream in ("stdout", "stderr"):
        program = f"import sys\nfor _ in range(1000): sys.{stream}.write('x' * 1_000_000)"
        verdict = run(program, output_bytes=100_000)
        assert verdict.status == "output" and stream in verdict.reason, verdict.reason
        assert len(getattr(verdict, stream)) == 100_000
    flood = (
        "import os\nfor fd in range(3, 64):\n  try:\n    while True: os.write(fd, b'x' * 9999)\n"
    )
    verdict = run(flood + "  except OSError: pass", output_bytes=100_000)
    assert verdict.status == "output" and "result" in verdict.reason, verdict.reason


def case_big_file():
    program = "with open('big', 'wb') as file:\n    for _ in range(32): file.write(bytes(1 << 20))"
    verdict = run(program, file_bytes=1 << 20)
    assert verdict.status == "error" and "File too large" in verdict.reason, verdict
    verdict = run("import os\nos.memfd_create('hidden')")
    assert "not permitted" in verdict.reason, verdict


def case_full_disk():
    if MODE == "restricted":
        return  # promised by "namespaces" alone
    program = "for i in range(64):\n    with open(str(i), 'wb') as f: f.write(bytes(1 << 20))"
    verdict = run(program, disk_bytes=8 << 20)
    assert verdict.status == "error" and "No space left" in verdict.reason, verdict


def case_fork_bomb():
    verdict = run(
        "import os, time\ncount = 0\ntry:\n    while True:\n"
        "        if os.fork() == 0: time.sleep(100)\n        count += 1\n"
        "except OSError as error: print(count, error.errno)",
        processes=4,
    )
    count, errno = map(int, verdict.stdout.split())
    assert (count, errno) == ((3, 11) if MODE != "restricted" else (0, 1)), verdict
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run(bomb, wall_s=1.0, processes=4).status == "timeout"
    verdict = run(
        "import threading, time\nfor _ in range(99):\n"
        "    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()",
        processes=4,
    )
    assert verdict.status == "error" and "thread" in verdict.reason, verdict


def case_zombies():
    if MODE == "restricted":
        return  # it starts no process
    program = (
        "import os, time\nfor i in range(4):\n    if os.fork() == 0: os._exit(0)\n"
        "time.sleep(0.2)\nprint('done')"
    )
    before = len(_zombies())
    verdict = run(program, processes=8)
    assert (verdict.status, verdict.stdout) == ("ok", "done\n"), verdict
    assert len(_zombies()) <= before, "a zombie stayed"


def _zombies() -> list[str]:
    """Dead children of this process that nobody has asked about."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state == "Z" and int(parent) in (1, os.getpid()):
            found.append(pid)
    return found


def case_deep_recursion():
    program = "def f(n): return f(n + 1)\nf(0)"
    assert "RecursionError" in run(program).reason
    verdict = run("import sys\nsys.setrecursionlimit(10**9)\n" + program)
    assert verdict.status in ("error", "signal", "timeout"), verdict
    assert run("x = '(' * 100000 + ')' * 100000\neval(x)").status in ("error", "signal")


def case_results_are_plain_data():
    verdict = call("def f(a, b=2): return {a: (b, [1.5, {3}, b'x', None])}", [[1], ["k", True]])
    assert [result["value"] for result in verdict.results] == [
        {1: (2, [1.5, {3}, b"x", None])},
        {"k": (True, [1.5, {3}, b"x", None])},
    ], verdict
    verdict = call("def f(a):\n    a.append(1)\n    return a", [[[]], [[]]])
    assert [result["value"] for result in verdict.results] == [[1], [1]], verdict
    verdict = call("def f(a): return 1 / a", [[0], [2]])
    assert verdict.results == ({"error": "ZeroDivisionError: division by zero"}, {"value": 0.5})
    assert call("g = 1", [[1]]).status == "error"


def case_an_early_exit_is_no_result():
    for end in ("import os\nos._exit(0)", "raise SystemExit(0)", "import sys\nsys.exit()"):
        assert call(end + "\ndef f(a): return a", [[1]]).results == ()
    inside = "import os\ndef f(a):\n    if a: os._exit(0)\n    return a"
    assert call(inside, [[0], [1], [0]]).results == ({"value": 0},)
    verdict = call("def f(a): raise SystemExit(0)", [[1], [2]])
    assert all("error" in result for result in verdict.results) and len(verdict.results) == 2


def case_lying_objects_are_no_result():
    liar = "class Liar({base}):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    for base in ("object", "int", "str", "list", "dict"):
        verdict = call(liar.format(base=base) + "def f(a): return Liar()", [[1]])
        assert "not plain data" in verdict.results[0]["error"], verdict
        verdict = call(liar.format(base=base) + "def f(a): return [Liar()]", [[1]])
        assert "not plain data" in verdict.results[0]["error"], verdict
    deep = "def f(a):\n    x = []\n    for _ in range(50): x = [x]\n    return x"
    assert "deeper" in call(deep, [[1]]).results[0]["error"]
    assert "error" in call("def f(a): return 'x' * 10**6", [[1]]).results[0]


def case_forged_results_are_only_data():
    program = (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, {text!r})\n"
        "    except OSError: pass\nos._exit(0)"
    )
    for text in (b"not json\n", b"[" * 100_000 + b"\n", b'{"value": {"set": [{"list": []}]}}\n'):
        verdict = call(program.format(text=text), [[1]])
        assert [list(result) for result in verdict.results] == [["error"]], verdict
    assert call(program.format(text=b"1\n" * 10), [[1]]).results[0].keys() == {"error"}
