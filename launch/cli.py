"""What every command shares: one-line errors, exit codes, the compile cache, the console."""

from __future__ import annotations

import difflib
import errno
import functools
import glob
import operator
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Sequence
from logging import getLogger
from typing import Any

from absl import app, flags, logging

from launch import out_of_memory
from moejax.core.errors import InputError
from moejax.core.memory import keep_freed, keep_parts, return_freed

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_PREEMPTED = 75  # SIGTERM: start the same command again

# A scheme at the start of a value, or of a part of it as in --models=A,B or --bridges=NAME=A.
_REMOTE = re.compile(r"(?:^|[,=])([A-Za-z][A-Za-z0-9+.-]*://)")
_PROSE = ("prompt", "system")  # flags of text for a model

COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache",
    "~/.cache/moejax/xla",
    "Folder where compiled programs are kept between runs; empty keeps none.",
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print shapes, memory and FLOPs, then stop.")


def run(main: Callable[[Sequence[str]], int | None], freed: str = "kept") -> None:
    """Runs an absl main so that whatever the user can mend is one line and an exit code.

    freed: what becomes of memory that the command frees. "kept" (`moejax.core.memory.keep_freed`,
    unless MOEJAX_KEEP_FREED is 0) for those that compute; "parts" (`moejax.core.memory.keep_parts`)
    for those that read and write piece by piece; "returned" (`moejax.core.memory.return_freed`)
    for those that compile.

    0 done; 2 bad input, bad flags or no space left; 3 out of memory (`launch.out_of_memory`); 130
    interrupted; 75 stopped by SIGTERM, wherever the command was: a training run has saved its state
    (`moejax.train.stopping`), others leave nothing half-written. Anything else is a bug of ours and
    keeps its traceback.
    """
    _show_help_of(main)
    argv = list(sys.argv)

    def guarded(args: Sequence[str]) -> int:
        if len(args) > 1:
            return _fail(f"unexpected argument {args[1]!r}: flags are written --name=value", 2)
        try:
            refuse_remote(flags.FLAGS)
            enable_compile_cache()
            if freed != "kept":
                {"parts": keep_parts, "returned": return_freed}[freed]()
            wanted = freed == "kept" and os.environ.get(out_of_memory.KEEP_FREED) != "0"
            if wanted and keep_freed():
                out_of_memory.remember_kept()
            return main(args) or 0
        except InputError as error:
            return _fail(str(error), EXIT_BAD_INPUT)
        except KeyboardInterrupt as stop:
            said = str(stop) or "interrupted; nothing half-written was left behind"
            return _fail(said, getattr(stop, "exit_code", EXIT_INTERRUPTED))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                where = f" while writing {error.filename}" if error.filename else ""
                return _fail(f"no space left on the device{where}: free some", EXIT_BAD_INPUT)
            if isinstance(error, (FileNotFoundError, PermissionError)) and error.filename:
                return _fail(f"{error.filename}: {error.strerror}", EXIT_BAD_INPUT)
            raise
        except (MemoryError, RuntimeError, ValueError) as error:
            if not out_of_memory.is_out_of_memory(error):
                raise
            return out_of_memory.answer(error)

    signal.signal(signal.SIGTERM, _terminate)
    logging.set_verbosity(logging.WARNING)
    if not glob.glob("/dev/nvidia[0-9]*"):
        # Its CUDA plugin, installed to compile for GPUs that are not there, fails with a traceback.
        told = "plugin configuration error"
        getLogger("jax._src.xla_bridge").addFilter(lambda record: told not in record.getMessage())
    app.run(guarded, argv=argv, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; a wrong one, or a wrong key of a config, is one line naming the right ones."""
    path = _config_path(argv)
    if path and not pathlib.Path(path.partition(":")[0]).is_file():
        sys.exit(_fail(f"--config={path}: no such file; the configs are in configs/", 2))
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        sys.exit(_fail(f"{_last_line(error)} (--help lists the flags)", EXIT_BAD_INPUT))
    except (AttributeError, KeyError, TypeError) as error:
        # config_flags raises these for `--config.some.typo=...`.
        sys.exit(_fail(_wrong_key(argv, path) or f"--config: {_last_line(error)}", EXIT_BAD_INPUT))


def _config_path(argv: Sequence[str]) -> str:
    """The value of --config, empty without one."""
    for i, arg in enumerate(argv[1:], 1):
        name, equals, value = arg.partition("=")
        if name in ("-config", "--config"):
            return value if equals else "".join(argv[i + 1 : i + 2])
    return ""


def _wrong_key(argv: Sequence[str], path: str) -> str:
    """Says which --config.KEY is none, and the keys there are; empty if all of them are."""
    from ml_collections import config_flags  # kept here: commands without a config never load it

    keys = leaf_keys(config_flags.config_flags._ConfigFileParser("config").parse(path))
    given = [arg.lstrip("-").partition("=")[0] for arg in argv[1:] if arg.startswith("-")]
    wrong = [name for name in given if name.startswith("config.") and name[7:] not in keys]
    if not wrong:
        return ""
    near = difflib.get_close_matches(wrong[0][7:], keys, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"--{wrong[0]}: {path} has no such key{hint}; its keys: {', '.join(sorted(keys))}"


def leaf(config, key: str) -> Any:
    """The value of a dotted name of `leaf_keys`."""
    return functools.reduce(operator.getitem, key.split("."), config)


def leaf_keys(config, prefix: str = "") -> list[str]:
    """Dotted names of every leaf of a ConfigDict."""
    keys: list[str] = []
    for name, value in config.items():
        dotted = f"{prefix}{name}"
        keys += leaf_keys(value, dotted + ".") if hasattr(value, "items") else [dotted]
    return keys


def _last_line(error: BaseException) -> str:
    """An error's text; of a traceback that config_flags put into it, the last line."""
    text = str(error.args[0] if error.args else error).strip()
    return text.splitlines()[-1] if "Traceback (most recent call last)" in text else text


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def refuse_remote(given: flags.FlagValues) -> None:
    """InputError where a flag or a key of a config names a place as gs://bucket/folder.

    Files are read and written by their paths on this machine, where such a name would be made a
    folder of the working directory.
    """
    for name in given:
        value = given[name].value
        if hasattr(value, "items"):
            keys = leaf_keys(value)
            named = {f"{name}.{key}": leaf(value, key) for key in keys}
        else:
            named = {name: value} if given[name].present and name not in _PROSE else {}
        for key, found in named.items():
            for text in found if isinstance(found, (list, tuple)) else [found]:
                if isinstance(text, str) and (remote := _REMOTE.search(text)):
                    raise InputError(
                        f"--{key}={text}: {remote[1]} names no file here: mount that storage on "
                        "every host (gcsfuse to read, NFS for a --workdir) and give the path"
                    )


class _Terminated(KeyboardInterrupt):
    """SIGTERM, where nobody waits for it to save something first."""

    exit_code = EXIT_PREEMPTED


def _terminate(signum, frame):
    raise _Terminated("stopped; nothing half-written was left behind: start the same command again")


def _show_help_of(main) -> None:
    """Makes --help print the command's own docstring, its flags and the shared ones."""
    for holder in (DRY_RUN, COMPILE_CACHE):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[holder.name])
    doc = sys.modules[main.__module__].__doc__
    if doc:
        sys.modules["__main__"].__doc__ = doc


def enable_compile_cache() -> None:
    """Keeps compiled programs on disk, so that the second run of a command starts at once."""
    folder = COMPILE_CACHE.value
    if not folder:
        return
    import jax  # a command that prints --help should not pay for it

    several = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if several and jax.__version_info__ < (0, 11):
        return  # read back, programs of several CPU devices wait on each other for ever there
    path = pathlib.Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(path, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
