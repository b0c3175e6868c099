"""What happens to a run when something breaks, done to real processes: prints the fault table.

    python -m tests.faults [DIR]        2 to 10 minutes; every run stays in DIR for a look

Each row breaks a run of 8 steps that saves every second one, starts the same command again, and
holds the losses of all steps, and the row of the data that its last checkpoint stands at, against
those of a run that nothing happened to. Processes are forked from this one, which has imported
everything but touched no device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from launch import cli, train
from moejax.io import checkpoint, orbax
from moejax.io.atomic import read_json
from moejax.train import loop
from moejax.train.log import read_metrics
from moejax.train.stopping import Agreement
from tests import fake_devices, tiny_run

STEPS, BROKEN_AT = 8, 5
Hook = Callable[[], None]


@dataclasses.dataclass
class Row:
    """One line of the table; `good` is whether everything was as it should be."""

    fault: str
    happened: str
    resumed: str
    lost: str
    good: bool


def run(folder: Path, workdir: Path, *flags: str, hook: Hook | None = None, devices: int = 1):
    """Forks a launch.train; gives its pid and the file that it writes to."""
    command = tiny_run.command(folder, workdir, f"--config.train.steps={STEPS}", *flags)
    index = next((flag[-1] for flag in flags if flag.startswith("--multihost")), "0")
    log = folder / f"{workdir.name}_{index}.log"
    pid = os.fork()
    if pid:
        return pid, log
    os.environ |= fake_devices.environment(devices)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 1
    try:
        if hook is not None:
            hook()
        sys.argv = ["train", *command[3:]]
        train.main.__module__ = "launch.train"
        cli.run(train.main)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:  # what a Python process would end with
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(pid: int, limit_s: float = 600) -> str:
    """How a process ended: "exit 2", "killed by 9"; it is killed after the limit."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return f"exit {code}" if code >= 0 else f"killed by {-code}"
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"hung for {limit_s:.0f} s"


def losses(workdir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(workdir) if "loss" in record]


def compared(found: list[float], wanted: list[float]) -> str:
    if found == wanted:
        return "same losses, bit for bit"
    if len(found) != len(wanted):
        return f"{len(found)} losses of {len(wanted)}"
    return f"losses within {max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True)):.0e}"


def data_row(workdir: Path) -> int:
    """Where the newest checkpoint says that the stream of rows stands; -1 without one."""
    found = sorted((workdir / "ckpt").glob("step_*/done.json"))
    return read_json(found[-1])["data"]["next_row"] if found else -1


def last_line(log: Path, word: str) -> str:
    lines = [line for line in log.read_text().splitlines() if word in line]
    return lines[-1] if lines else ""


# -- what is done to a process, in the process ---------------------------------------------------


def die_in_step(step: int = BROKEN_AT) -> None:
    """kill -9 once a step is on the device and nobody has its result."""
    plain, count = Agreement.reached, [0]

    def reached(self, flag):
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, flag)

    Agreement.reached = reached


def die_in_save() -> None:
    """kill -9 while orbax writes the checkpoint of step 6."""
    plain = orbax.start_saving

    def start(path, params):
        finish = plain(path, params)
        if int(params["step"]) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return finish

    orbax.start_saving = start


def fill_disk(ballast: Path) -> Hook:
    """Fills the file system before the checkpoint of step 6."""
    plain = checkpoint.Checkpoints.start

    def start(self, step, params, *rest, **more):
        if step == 6:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))
        return plain(self, step, params, *rest, **more)

    def hook() -> None:
        checkpoint.Checkpoints.start = start

    return hook


def send(number: int) -> Hook:
    """A signal to itself in step 5, from outside Python's point of view."""

    def hook() -> None:
        plain = loop._Run._record

        def record(self, step, *args):
            if step == BROKEN_AT:
                os.kill(os.getpid(), number)
            return plain(self, step, *args)

        loop._Run._record = record

    return hook


def hang() -> None:
    """A step that takes 3 seconds, as if a collective waited for somebody."""
    plain, count = Agreement.reached, [0]

    def reached(self, flag):
        count[0] += 1
        if count[0] == BROKEN_AT:
            time.sleep(3)
        return plain(self, flag)

    Agreement.reached = reached


# -- the rows ------------------------------------------------------------------------------------


class Table:
    """Runs the faults one after the other in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cache = f"--compile_cache={folder / 'xla'}"
        tiny = os.fork()
        if not tiny:
            os.environ["JAX_PLATFORMS"] = "cpu"
            tiny_run.write(folder, moe_too=False)
            os._exit(0)
        assert ended(tiny) == "exit 0"
        self.rows: list[Row] = []

    def one(self, name: str, *flags: str, **kwargs) -> str:
        pid, _ = run(self.folder, self.folder / name, self.cache, *flags, **kwargs)
        return ended(pid)

    def two(self, name: str, *more: str, hook: Hook | None = None) -> list[str]:
        """Two processes of one device; the hook is the second one's."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        pids = []
        for index in (0, 1):
            place = f"--multihost=127.0.0.1:{port},2,{index}"
            flags = [self.cache, place, "--multihost_heartbeat=10", *more]
            workdir = self.folder / name
            pids.append(run(self.folder, workdir, *flags, hook=hook if index else None)[0])
        return [ended(pid) for pid in pids]

    def add(self, name: str, fault: str, happened: str, wanted: list[float], again: str) -> Row:
        """Adds the row of a run that was started again."""
        log = self.folder / f"{name.rpartition('/')[2]}_0.log"
        said = last_line(log, "resuming at step")
        start = said.partition("resuming at ")[2].partition(" of")[0] or "did not resume"
        same = compared(losses(self.folder / name), wanted)
        good = again == "exit 0" and same.startswith(("same", "losses within")) and bool(said)
        stands = data_row(self.folder / name)
        good &= stands == STEPS * 8
        same += f", data at row {stands}"
        lost = "nothing" if good else "SOMETHING"
        row = Row(fault, happened, f"from {start}: {same}", lost, good)
        self.rows.append(row)
        print(f"  {row.fault}: {row.happened}; {row.resumed}", flush=True)
        return row

    def single(self) -> list[float]:
        """Everything that one process shows; gives the losses of the run that nothing hit."""
        assert self.one("plain") == "exit 0", (self.folder / "plain_0.log").read_text()[-2000:]
        wanted = losses(self.folder / "plain")
        assert len(wanted) == STEPS and data_row(self.folder / "plain") == STEPS * 8
        end = self.one("step", hook=die_in_step)
        shutil.copytree(self.folder / "step", self.folder / "mesh")
        self.add("step", "kill -9 in a step", end, wanted, self.one("step"))
        end = self.one("save", hook=die_in_save)
        self.add("save", "kill -9 in a save", end, wanted, self.one("save"))
        end = self.one("term", hook=send(signal.SIGTERM))
        for copy in ("corrupt", "shrunk"):
            shutil.copytree(self.folder / "term", self.folder / copy)
        self.add("term", "SIGTERM", f"{end}, saved", wanted, self.one("term"))
        self.corrupt(wanted)
        self.shrunk(wanted)
        self.full_disk(wanted)
        self.hanging(wanted)
        again = self.one("mesh", devices=4)
        self.add("mesh", "kill -9; resumed on 4 devices", "killed by 9", wanted, again)
        return wanted

    def corrupt(self, wanted: list[float]) -> None:
        newest = max((self.folder / "corrupt" / "ckpt").glob("step_*"))
        file = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        again = self.one("corrupt")
        said = last_line(self.folder / "corrupt_0.log", "is broken: going back")
        happened = "says so, falls back" if said else "SILENT"
        row = self.add("corrupt", "newest checkpoint corrupted", happened, wanted, again)
        row.good &= bool(said)

    def shrunk(self, wanted: list[float]) -> None:
        data = self.folder / "data.jsonl"
        whole = data.read_bytes()
        data.write_bytes(b"\n".join(whole.split(b"\n")[:300]) + b"\n")
        end = self.one("shrunk")
        data.write_bytes(whole)
        said = last_line(self.folder / "shrunk_0.log", "The data is not what the run began with")
        again = self.one("shrunk")
        row = self.add("shrunk", "data file shrinks", f"{end}, names both sizes", wanted, again)
        row.good &= end == "exit 2" and bool(said)

    def full_disk(self, wanted: list[float]) -> None:
        place = self.folder / "small"
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
        if subprocess.run(mount, capture_output=True).returncode:
            self.rows.append(Row("full disk", "not tried: no right to mount", "-", "-", False))
            return
        try:
            end = self.one("small/run", hook=fill_disk(place / "ballast"))
            said = last_line(self.folder / "run_0.log", "error:") or "no words"
            (place / "ballast").unlink()
            again = self.one("small/run")
            happened = f"{end}, {said.removeprefix('error: ').partition(' while')[0]}"
            self.add("small/run", "full disk", happened, wanted, again)
        finally:
            subprocess.run(["umount", str(place)], check=True)

    def hanging(self, wanted: list[float]) -> None:
        end = self.one("hang", "--config.train.hang_s=1", hook=hang)
        stacks = self.folder / "hang" / "stacks" / "process_0.txt"
        seen = stacks.exists() and "reached" in stacks.read_text()
        same = compared(losses(self.folder / "hang"), wanted)
        good = end == "exit 0" and seen and same.startswith("same")
        happened = "stacks of all threads in stacks/" if seen else "NOT SEEN"
        self.rows.append(Row("a step hangs", happened, f"went on: {same}", "nothing", good))

    def several(self, wanted: list[float]) -> None:
        """What two processes show."""
        assert self.two("two_plain") == ["exit 0"] * 2
        plain = losses(self.folder / "two_plain")
        start = time.monotonic()
        first, second = self.two("two", hook=die_in_step)
        happened = f"{second}; the other: {first} after {time.monotonic() - start:.0f} s in all"
        shutil.copytree(self.folder / "two", self.folder / "back")
        again = "exit 0" if self.two("two") == ["exit 0"] * 2 else "failed"
        self.add("two", "kill -9 of one of 2 processes", happened, plain, again)
        again = self.one("back")
        self.add("back", "the same; resumed on 1 process", happened, wanted, again)
        self.stopped(plain)

    def stopped(self, wanted: list[float] | None = None) -> Row:
        """SIGTERM to the second of two processes while the best evaluation is kept."""
        flags = ["--config.train.keep_best=True", "--config.train.eval_every=2"]
        flags.append("--config.train.save_every=0")
        first, second = self.two("stopped", *flags, hook=send(signal.SIGTERM))
        saved = sorted(path.name for path in (self.folder / "stopped" / "ckpt").iterdir())
        said = [last_line(self.folder / f"stopped_{i}.log", "is saved") for i in (0, 1)]
        ends = self.two("stopped", *flags)
        again = "exit 0" if ends == ["exit 0"] * 2 else "failed"
        found = losses(self.folder / "stopped")
        happened = f"{first}, {second}; {', '.join(saved)} saved"
        fault = "SIGTERM to one of 2 processes"
        row = self.add("stopped", fault, happened, found if wanted is None else wanted, again)
        # The signal comes in step 5, is passed on with step 6, and all stop after the one behind.
        row.good &= first == second == "exit 75" and saved == ["step_00000007"]
        row.good &= said[0].partition(": ")[2] == said[1].partition(": ")[2] != ""
        row.good &= len(found) == STEPS and (self.folder / "stopped" / "best.json").exists()
        return row


def main(argv: list[str]) -> int:
    folder = Path(argv[1] if len(argv) > 1 else tempfile.mkdtemp(prefix="moejax-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"runs and logs in {folder}", flush=True)
    table = Table(folder)
    table.several(table.single())
    print("\n| fault | what happened | after starting it again | lost |")
    print("| --- | --- | --- | --- |")
    for row in table.rows:
        print(f"| {row.fault} | {row.happened} | {row.resumed} | {row.lost} |")
    return 0 if all(row.good for row in table.rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
