"""Programs that reach for what is not theirs, or try to stay."""

import os
import socket
import subprocess
import sys
import tempfile
import time

from sandbox_box import FILES_HIDDEN, MODE, RENAME, named, run


def case_no_network():
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    verdict = run(
        "import socket, _socket\nfor family in (1, 2, 10, 16, 17, 40):\n"
        "    for kind in (1, 2, 3):\n"
        "        try: _socket.socket(family, kind, 0)\n"
        "        except OSError as error: print(error.errno)\n"
        f"try: socket.create_connection(('127.0.0.1', {port}), 1)\n"
        "except OSError: print('refused')\n"
        "try: socket.create_connection(('example.com', 80), 1)\n"
        "except OSError: print('refused')"
    )
    assert verdict.stdout.split() == ["1"] * 18 + ["refused"] * 2, verdict
    server.setblocking(False)
    try:
        server.accept()
        raise AssertionError("a connection came through")
    except BlockingIOError:
        server.close()


def case_no_inherited_files():
    verdict = run(
        "import os, stat\nfor fd in range(64):\n    try: mode = os.fstat(fd).st_mode\n"
        "    except OSError: continue\n    print(fd, stat.S_ISFIFO(mode))"
    )
    kinds = dict(line.split() for line in verdict.stdout.splitlines())
    assert [kinds.pop(fd) for fd in "012"] == ["False", "True", "True"], verdict
    assert list(kinds.values()) == ["True"], verdict  # the results


def case_environment():
    os.environ["MOEJAX_TEST_SECRET"] = "swordfish"
    program = (
        "import os\nprint(dict(os.environ))\n"
        "for pid in [os.getpid(), os.getppid(), 1, {pid}]:\n"
        "    try: print(open(f'/proc/{{pid}}/environ', 'rb').read())\n"
        "    except OSError: print('hidden')\n"
    )
    verdict = run(program.format(pid=os.getpid()))
    assert verdict.status == "ok" and "swordfish" not in verdict.stdout, verdict
    assert "HOME" not in verdict.stdout and "PATH" not in verdict.stdout, verdict


def _open_folder() -> str:
    folder = tempfile.mkdtemp(dir="/tmp")
    os.chmod(folder, 0o777)
    return folder


def case_files_outside():
    folder = _open_folder()
    victim = folder + "/victim"
    with open(victim, "w") as file:
        file.write("precious")
    os.chmod(victim, 0o666)
    before = os.stat(victim)
    verdict = run(
        f"import os\nvictim = {victim!r}\n"
        "def attempt(name, action):\n"
        "    try: action()\n"
        "    except OSError as error: return\n"
        "    print('done:', name)\n"
        "attempt('read', lambda: open(victim).read())\n"
        "attempt('list', lambda: os.listdir(os.path.dirname(victim)))\n"
        "attempt('write', lambda: open(victim, 'w'))\n"
        "attempt('append', lambda: open(victim, 'a'))\n"
        "attempt('truncate', lambda: os.truncate(victim, 0))\n"
        "attempt('chmod', lambda: os.chmod(victim, 0o777))\n"
        "attempt('utime', lambda: os.utime(victim, (1, 1)))\n"
        "attempt('xattr', lambda: os.setxattr(victim, 'user.x', b'1'))\n"
        "attempt('rename', lambda: os.rename(victim, victim + '2'))\n"
        "attempt('link', lambda: os.link(victim, 'linked'))\n"
        "attempt('unlink', lambda: os.unlink(victim))\n"
        "attempt('symlink', lambda: (os.symlink(victim, 's'), open('s', 'w')))\n"
        "attempt('new', lambda: open(victim + '-new', 'w'))\n"
        "attempt('usr', lambda: open('/usr/moejax-was-here', 'w'))\n"
        "attempt('library', lambda: open(os.__file__, 'a'))\n"
        "attempt('passwd', lambda: open('/etc/passwd').read())\n"
        "for place in ('/var/tmp', '/dev/shm', '/run', '/root', os.path.expanduser('~')):\n"
        "    attempt(place, lambda: open(place + '/moejax-was-here', 'w'))\n"
        "open('own', 'w').write('x')\nos.mkdir('folder')\nprint(open('own').read())"
    )
    after = os.stat(victim)
    if FILES_HIDDEN:
        assert verdict.stdout == "x\n", verdict
        with open(victim) as file:
            assert file.read() == "precious"
        assert (before.st_mode, before.st_mtime) == (after.st_mode, after.st_mtime)
        assert os.listdir(folder) == ["victim"]
    else:  # uid 65534 without Landlock: only what everybody may do
        assert "done: usr" not in verdict.stdout and "done: library" not in verdict.stdout, verdict
    for place in ("/var/tmp", "/dev/shm", "/run", "/root", "/usr"):
        if FILES_HIDDEN:
            assert not os.path.exists(place + "/moejax-was-here"), place


def case_private_files_of_this_user():
    folder = tempfile.mkdtemp()  # mode 700
    with open(folder + "/key", "w") as file:
        file.write("swordfish")
    verdict = run(f"print(open({folder + '/key'!r}).read())")
    assert verdict.status == "error" and "swordfish" not in verdict.stdout, verdict


def case_other_processes():
    victim = subprocess.Popen(["sleep", "60"])
    try:
        verdict = run(
            "import os, resource, ctypes\n"
            f"targets = [os.getppid(), 1, -1, 0, {os.getpid()}, {victim.pid}]\n"
            "def attempt(name, action):\n"
            "    try: action()\n"
            "    except (OSError, ValueError): return\n"
            "    print('done:', name)\n"
            "for pid in targets:\n"
            "    for number in (9, 15, 19): attempt('kill', lambda: os.kill(pid, number))\n"
            f"attempt('killpg', lambda: os.killpg({os.getpgid(0)}, 9))\n"
            f"attempt('limit', lambda: resource.prlimit({victim.pid}, 0, (0, 0)))\n"
            f"attempt('nice', lambda: os.setpriority(0, {victim.pid}, 19))\n"
            f"attempt('affinity', lambda: os.sched_setaffinity({victim.pid}, [0]))\n"
            "libc = ctypes.CDLL(None)\n"
            f"print(libc.ptrace(16, {victim.pid}, 0, 0), libc.ptrace(16, os.getppid(), 0, 0))"
        )
        assert verdict.stdout == "-1 -1\n", verdict
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def case_refused_system_calls():
    verdict = run(
        "import ctypes, platform\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(*numbers):\n"
        "    number = numbers[platform.machine() == 'aarch64']\n"
        "    result = libc.syscall(number, 0, 0, 0, 0, 0)\n"
        "    print(result, ctypes.get_errno())\n"
        "call(425, 425); call(317 + 4, 280); call(165, 40); call(272, 97); call(161, 51)\n"
        "call(298, 241); call(323, 282); call(29, 194); call(438, 438); call(435, 435)\n"
        "call(9999, 9999)\nprint(libc.syscall(16, 1, 0x5412, b'x'), ctypes.get_errno())"
        if os.uname().machine == "x86_64"
        else "print('-1 1\\n' * 9 + '-1 38\\n' * 2 + '-1 1')"
    )
    assert verdict.stdout.split("\n") == ["-1 1"] * 9 + ["-1 38"] * 2 + ["-1 1", ""], verdict


def case_no_rights():
    verdict = run(
        "import ctypes, os, struct\n"
        "def attempt(name, action):\n"
        "    try: action()\n"
        "    except OSError: return\n"
        "    print('done:', name)\n"
        "attempt('setuid', lambda: os.setuid(0))\n"
        "attempt('setgroups', lambda: os.setgroups([0]))\n"
        "attempt('nice', lambda: os.nice(-5))\n"
        "header = ctypes.create_string_buffer(struct.pack('=Ii', 0x20080522, 0), 8)\n"
        "sets = ctypes.create_string_buffer(24)\n"
        "ctypes.CDLL(None).capget(header, sets)\n"
        "print(os.getuid() == 0, os.geteuid() == 0, sets.raw == bytes(24))"
    )
    assert verdict.stdout == "False False True\n", verdict


def case_stdin_and_terminal():
    assert "EOFError" in run("input()", wall_s=3.0).reason
    assert run("import sys\nprint(repr(sys.stdin.read()))").stdout == "''\n"
    assert run("open('/dev/tty')").status == "error"


def case_nothing_is_left_behind():
    if MODE == "restricted":
        return  # nothing can be started: case_fork_bomb
    marker = f"left{os.getpid()}"
    verdict = run(
        RENAME.format(marker=marker)
        + "import os, time\nif os.fork() == 0:\n    os.setsid()\n"
        + "    if os.fork() == 0: time.sleep(100)\n    os._exit(0)\n"
        + "for _ in range(3):\n    if os.fork() == 0: os._exit(0)\n"
        + "time.sleep(0.2)\nprint('parent ends')"
    )
    assert verdict.status == "ok" and verdict.wall_s < 5, verdict
    assert named(marker) == []
    try:
        os.waitpid(-1, os.WNOHANG)
        raise AssertionError("a child is left")
    except ChildProcessError:
        pass


def case_dies_with_its_caller():
    marker = f"orph{os.getpid()}"
    program = RENAME.format(marker=marker) + "import time\ntime.sleep(100)"
    code = (
        "from moejax.evals import sandbox\n"
        f"sandbox.run_python({program!r}, sandbox.Limits(wall_s=60), "
        f"allow_code_execution=True, mode={MODE!r})"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
    deadline = time.monotonic() + 10
    while not named(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert named(marker), "the program never started"
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 5
    while named(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not named(marker), "the program outlived its caller"


def case_temporary_folder_is_removed():
    before = set(os.listdir(tempfile.gettempdir()))
    verdict = run(
        "import os\nfor i in range(20): open(str(i), 'w')\n"
        "os.makedirs('a/b/c')\nos.mkdir('shut', 0)\nos.mkdir('a/shut', 0)\n"
        "os.symlink('/', 'root')\nprint('made')"
    )
    assert verdict.stdout == "made\n", verdict
    run("open('x', 'w')\nwhile True: pass", wall_s=0.5)
    assert set(os.listdir(tempfile.gettempdir())) == before
