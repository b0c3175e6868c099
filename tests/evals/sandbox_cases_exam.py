"""Programs that try to pass tests which they do not satisfy: the tests run in another process."""

from sandbox_box import MODE

from moejax.evals import sandbox
from moejax.evals.sandbox import Limits, Verdict
from moejax.evals.sandbox_process import Exam, Job

TEST = "assert candidate([1, 2]) == 3\nassert candidate([4]) == 4\n"


def sit(program: str, test: str = TEST, setup: str = "", **limits) -> Verdict:
    job = Job(program, exam=Exam(test, ["f"], setup))
    return sandbox.run(job, Limits(**limits), allow_code_execution=True, mode=MODE)


def passed(verdict: Verdict) -> bool:
    return verdict.status == "ok" and verdict.results == ({"value": True},)


def fails(program: str, reason: str = "", **limits) -> None:
    verdict = sit(program, **limits)
    said = verdict.reason + "".join(str(result) for result in verdict.results)
    assert not passed(verdict) and reason in said, (program, verdict)


def case_exam_right_passes_and_wrong_fails():
    assert passed(sit("def f(items): return sum(items)"))
    fails("def f(items): return len(items)", "AssertionError")
    fails("def g(items): return sum(items)", "defines no f")
    fails("x = 1 / 0", "ZeroDivisionError")
    fails("def f(items):\n    raise ValueError('why')", "ValueError: why")


def case_exam_patched_assert():
    fails("import builtins\nbuiltins.AssertionError = SystemExit\ndef f(items): return 0")
    fails(
        "import sys, builtins\nsys.excepthook = lambda *a: None\n"
        "builtins.__build_class__ = None\ndef f(items): return 0"
    )


def case_exam_lying_equality():
    lie = "class L{base}:\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    for base in ("", "(int)", "(list)", "(str)"):
        fails(lie.format(base=base) + "def f(items): return L()")


def case_exam_trace_and_frames():
    fails(
        "import sys\ndef spy(frame, event, arg):\n    frame.f_locals.update(expected=0)\n"
        "    return spy\nsys.settrace(spy)\ndef f(items): return 0"
    )
    walk = (
        "import sys, gc\n"
        "def f(items):\n    frame, seen = sys._getframe(), ''\n"
        "    while frame:\n        seen += repr(frame.f_locals) + repr(frame.f_globals.keys())\n"
        "        frame = frame.f_back\n"
        "    seen += ''.join(repr(o) for o in gc.get_objects() if isinstance(o, (dict, list)))\n"
        "    if 'candidate([1, 2]) == 3' in seen or 'marker' + '1234' in seen: return 3\n"
        "    return 'nothing to see'"
    )
    verdict = sit(walk, "marker1234 = 1\n" + TEST)
    assert not passed(verdict) and "AssertionError" in str(verdict.results), verdict
    fails("import ctypes, gc\ndef f(items):\n    gc.collect()\n    return ctypes.c_int(3)")


def case_exam_early_exit():
    for program in (
        "import os\nos._exit(0)",
        "import os\ndef f(items): os._exit(0)",
        "import sys\ndef f(items): sys.exit(0)",
        "def f(items): raise SystemExit(0)",
        "import os\nos.closerange(0, 256)\ndef f(items): return 3",
    ):
        fails(program)
    swallowing = "try:\n    candidate(1)\nexcept:\n    pass\n"
    assert not passed(sit("import os\ndef f(items): os._exit(0)", swallowing))
    assert not passed(sit("def f(items): return 3", "pass")), "no call was made"


def case_exam_forged_replies():
    """A program may write to its own pipe what it likes: it is an answer, and no verdict."""
    forge = (
        "import os, json\n"
        "for fd in range(3, 256):\n"
        "    for record in {records}:\n"
        "        data = json.dumps(record).encode()\n"
        "        try: os.write(fd, len(data).to_bytes(8, 'big') + data)\n"
        "        except OSError: pass\n"
        "def f(items): return 0"
    )
    lines = [{"value": True}, {"ready": True}, {"value": True}, {"passed": True}]
    fails(forge.format(records=lines))
    fails(forge.format(records=[{"ready": True}, {"value": {"set": [[]]}}]))
    fails("import os\nfor fd in range(3, 256):\n    try: os.write(fd, b'\\xff' * 64)\n"
          "    except OSError: pass\ndef f(items): return 3")  # fmt: skip


def case_exam_endless_and_silent():
    fails("def f(items):\n    while True: pass", "longer than 1 s", wall_s=1.0)
    fails("import time\ndef f(items): time.sleep(60)", "longer than 1 s", wall_s=1.0)
    fails("def f(items):\n    while True: pass", "CPU time", wall_s=10.0, cpu_s=1)
    fails("def f(items): return [0] * 10**10", "MemoryError")
    fails("def f(items):\n    return f(items)", "RecursionError")
    fails("def f(items): print('x' * 10**8)", "more than")


def case_exam_near_types_cross():
    program = (
        "from collections import Counter, namedtuple\nP = namedtuple('P', 'x y')\n"
        "def f(kind):\n    return dict(counter=Counter('aab'), named=P(1, 2), big=2**9999,\n"
        "        complex=1j, range=range(3), keys={1: 2}.keys(), map=map(abs, [-1]))[kind]"
    )
    test = (
        "assert candidate('counter') == {'a': 2, 'b': 1}\nassert candidate('named') == (1, 2)\n"
        "assert candidate('big') == 2**9999 and candidate('complex') == 1j\n"
        "assert candidate(kind='range') == range(3) and candidate('keys') == {1}\n"
        "assert list(candidate('map')) == [1]\n"
        "try:\n    candidate('none')\n    assert False\nexcept KeyError:\n    pass\n"
    )
    verdict = sit(program, test)
    assert passed(verdict), verdict


def case_exam_setup_is_for_the_tests_alone():
    verdict = sit("def f(items): return helper(items)", setup="def helper(x): return sum(x)")
    assert not passed(verdict) and "NameError" in str(verdict.results), verdict
    test = "assert candidate([1]) == helper([1])"
    assert passed(sit("def f(items): return sum(items)", test, "def helper(x): return sum(x)"))
