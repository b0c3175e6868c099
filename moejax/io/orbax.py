"""The only module that knows orbax: a tree of arrays to a folder and back.

What it settles (orbax 0.12.8): weights do not compress, and trying takes three times as long and a
second copy; a stored shape other than the one asked for is padded without a word, so shapes are
compared first; without a sharding orbax trusts the devices of the machine that wrote.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from moejax.core import tree
from moejax.core.errors import InputError


def save_tree(
    path: str | os.PathLike[str], params: tree.Tree, chunk_bytes: int | None = None
) -> None:
    """Writes nested dicts of arrays to a new folder. Inverse: `load_tree`.

    One process calls it, with arrays of its own; of several, no other is waited for.
    chunk_bytes: about how much is stored as one block; None: an array.
    """
    # Among several processes jax arrays are taken for parts of global ones, numpy's are not.
    convert = _as_jax if jax.process_count() == 1 else np.asarray
    with _context(chunk_bytes, alone=True), _unchecked():
        ocp.save(Path(path).absolute(), jax.tree.map(convert, params))


def start_saving(path: str | os.PathLike[str], params: tree.Tree) -> Callable[[], None]:
    """`save_tree` in the background: what is returned waits for it and raises its error.

    On return the arrays may be donated: what is saved is what they held. Every process makes the
    call; each writes the parts of global arrays that it holds.
    """
    with _context():
        response = ocp.save_async(Path(path).absolute(), jax.tree.map(_as_jax, params))
    return lambda: response.result()


def read_abstract(path: str | os.PathLike[str]) -> tree.Tree:
    """Shapes and dtypes of a folder's tree; InputError for one that cannot be read."""
    try:
        stored = ocp.metadata(Path(path).absolute()).metadata
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
    except (ValueError, OSError, KeyError, AttributeError) as error:
        raise broken(path, error) from error


def load_tree(path: str | os.PathLike[str], wanted: tree.Tree, partial: bool = False) -> tree.Tree:
    """Reads a folder into the kind of leaf that `wanted` holds. Inverse: `save_tree`.

    Args:
      path: the folder.
      wanted: nested dicts of `jax.ShapeDtypeStruct` (a jax array comes back, on its sharding or
        the default device) or of numpy arrays (`on_host` makes such templates).
      partial: leave what `wanted` lacks on the disk.

    Errors: InputError where paths or shapes differ, or the files are broken.
    """
    check_fits(path, wanted, partial)
    wanted = jax.tree.map(_placed, wanted)
    if partial:
        rest = tree.map_with_path(lambda name, leaf: ocp.PLACEHOLDER, read_abstract(path))
        asked = tree.flatten(wanted)
        wanted = tree.unflatten(tree.flatten(rest) | asked)
    try:
        with _context():
            found = ocp.load(Path(path).absolute(), wanted)
    except (ValueError, OSError, KeyError) as error:
        raise broken(path, error) from error
    if not partial:
        return found
    leaves = tree.flatten(found)
    return tree.unflatten({name: leaves[name] for name in asked})


def check_fits(path: str | os.PathLike[str], wanted: tree.Tree, partial: bool = False) -> None:
    """Raises InputError unless a folder holds the paths and shapes of `wanted`, and no others
    (unless `partial`)."""
    stored = tree.flatten(read_abstract(path))
    for name, leaf in tree.flatten(wanted).items():
        if name not in stored:
            raise InputError(f"{path} lacks {name}: it was written for another config")
        if stored[name].shape != leaf.shape:
            raise InputError(
                f"{path}: {name} has shape {list(stored[name].shape)}, the config asks for "
                f"{list(leaf.shape)}"
            )
    extra = sorted(stored.keys() - tree.flatten(wanted).keys())
    if extra and not partial:
        raise InputError(f"{path} also holds {extra[0]}: it was written for another config")


def on_host(leaf: Any) -> np.ndarray:
    """A template that asks for a numpy array, at no memory: one element, broadcast."""
    return np.broadcast_to(np.empty((), leaf.dtype), leaf.shape)


def _as_jax(leaf: Any) -> Any:
    """A numpy array as a jax array on the CPU: orbax would copy it, jax aliases it if aligned."""
    if not isinstance(leaf, np.ndarray):
        return leaf
    try:
        return jax.device_put(leaf, jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # no CPU backend beside the accelerator's
        return leaf


def _placed(leaf: Any) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct) or leaf.sharding is not None:
        return leaf
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)


@contextlib.contextmanager
def _context(chunk_bytes: int | None = None, alone: bool = False) -> Iterator[None]:
    """Our options, and no interrupt half way. alone: the other processes are not at it."""
    context = ocp.Context()
    if alone and jax.process_count() > 1:
        me = jax.process_index()
        context.multiprocessing.primary_host = me
        context.multiprocessing.active_processes = {me}
        context.multiprocessing.barrier_sync_key_prefix = f"alone_{me}"
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = chunk_bytes
    with context, interrupts_held():
        yield


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Among several processes, leaves out orbax 0.12's check that all of them save to one folder.

    It asks every process, whatever `active_processes` says, also those that do not save.
    """
    if jax.process_count() == 1:
        yield
        return
    from orbax.checkpoint.experimental.v1._src.saving import execution

    check = "_check_directory_consistency"
    if not hasattr(execution, check):
        yield
        return
    with mock.patch.object(execution, check, lambda directory: None):
        yield


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Holds ctrl-C and SIGTERM back while orbax works; a second one acts at once.

    Its threads would write on into a folder that the caller, interrupted, is removing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in found.items() if callable(handler)}
    held: list[int] = []

    def hold(number, frame):
        held.append(number)
        if len(held) > 1:
            handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for waiting in held:
        handlers[signal.Signals(waiting)](waiting, None)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return "/orbax/" not in record.pathname


# Its threads log every error that is raised as well, a page of traceback each, whenever they end.
logging.getLogger("absl").addFilter(_is_not_orbax)


def broken(path: str | os.PathLike[str], error: Exception) -> InputError:
    """What to raise for a folder that orbax, or tensorstore below it, cannot read."""
    lines = str(error).splitlines() or [type(error).__name__]
    return InputError(f"{path} is broken or incomplete ({lines[0][:200]})")
