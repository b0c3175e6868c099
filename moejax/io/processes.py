"""What the processes of one run have to agree on: calls that all of them make, in one order."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moejax.core import tree
from moejax.core.errors import InputError

_MESSAGE_BYTES = 2000


def is_first() -> bool:
    """Whether this process writes what there is one of: logs, records, a checkpoint's last file."""
    return jax.process_index() == 0


def texts(text: str) -> list[str]:
    """The text of every process, by its number; cut at 2,000 bytes."""
    if jax.process_count() == 1:
        return [text]
    raw = text.encode()[:_MESSAGE_BYTES]
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    message[: len(raw)] = np.frombuffer(raw, np.uint8)
    return [bytes(found).rstrip(b"\0").decode(errors="replace") for found in _gather(message)]


def all_bytes(data: bytes) -> list[bytes]:
    """The bytes of every process, by its number."""
    if jax.process_count() == 1:
        return [data]
    sizes = _gather(np.array([len(data)], np.int32))[:, 0]
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return [row[:size].tobytes() for row, size in zip(_gather(padded), sizes, strict=True)]


def agree(problem: str = "") -> None:
    """Raises InputError on every process when one of them has a problem, with its words."""
    for index, text in enumerate(texts(problem)):
        if text:
            raise InputError(text if text == problem else f"process {index}: {text}")


def from_first(value: int) -> int:
    """The number that process 0 has."""
    if jax.process_count() == 1:
        return value
    return int(_gather(np.array([value], np.int32))[0, 0])


def to_host(params: tree.Tree) -> tree.Tree:
    """Arrays that are spread over processes as numpy arrays on the first; elsewhere empty ones."""

    def whole(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        assert isinstance(leaf.sharding, NamedSharding)
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        gather = jax.jit(lambda x: x, out_shardings=everywhere)
        value = np.empty(leaf.shape if is_first() else 0, leaf.dtype)
        # A stack travels layer by layer, so that no device holds all of it.
        parts = range(leaf.shape[0]) if leaf.ndim > 2 else [slice(None)]
        for part in parts:
            # Everybody waits for each: a process that ran ahead had its CPU devices' threads taken
            # by later exchanges, and the others waited for ever for the one before.
            found = jax.block_until_ready(gather(leaf[part]))
            if is_first():
                value[part] = found
        return value

    return jax.tree.map(whole, params)


def _gather(value: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value))
