"""Runs launchers in processes forked from this one, which has imported what they all need.

`tests.commands` starts it once and asks by lines of JSON; importing jax and its friends takes some
three seconds of each launcher that is started by itself. No device is touched before the fork.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
from typing import Any

PRELOADED = (
    *("absl.app", "datasets", "flax.nnx", "grain", "jax.experimental.pallas", "jax.numpy"),
    *("matplotlib.pyplot", "ml_collections", "moejax", "moejax.evals.run", "moejax.io.load"),
    *("moejax.serve.engine", "moejax.train.loop", "optax", "orbax.checkpoint.experimental.v1"),
    "tokenizers",
)


def main() -> None:
    """Answers {"pid"} and then {"code"} to each request; ends with its input."""
    for name in PRELOADED:
        importlib.import_module(name)
    say({})
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if not pid:
            become(asked)
            return
        say({"pid": pid})
        say({"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])})


def say(value: dict[str, int]) -> None:
    print(json.dumps(value), flush=True)


def become(asked: dict[str, Any]) -> None:
    """Turns this process into `python -m MODULE FLAGS`; the interpreter then ends as ever."""
    os.setsid()
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams = (os.devnull, os.O_RDONLY), (asked["out"], os.O_WRONLY), (asked["err"], os.O_WRONLY)
    for number, (path, how) in enumerate(streams):
        os.dup2(os.open(path, how), number)
    sys.argv = [asked["module"], *asked["flags"]]
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
