"""What the processes of one run have to agree on: calls that all of them make, in one order."""

from __future__ import annotations

import jax
import numpy as np

from moejax.core.errors import InputError

_MESSAGE_BYTES = 600


def is_first() -> bool:
    """Whether this process writes what there is one of: logs, records, a checkpoint's last file."""
    return jax.process_index() == 0


def agree(problem: str = "") -> None:
    """Raises InputError on every process when one of them has a problem, with its words."""
    if jax.process_count() == 1:
        if problem:
            raise InputError(problem)
        return
    raw = problem.encode()[:_MESSAGE_BYTES]
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    message[: len(raw)] = np.frombuffer(raw, np.uint8)
    for index, found in enumerate(_gather(message)):
        text = bytes(found).rstrip(b"\0").decode(errors="replace")
        if text:
            raise InputError(text if text == problem else f"process {index}: {text}")


def from_first(value: int) -> int:
    """The number that process 0 has."""
    if jax.process_count() == 1:
        return value
    return int(_gather(np.array([value], np.int32))[0, 0])


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return flag if jax.process_count() == 1 else bool(_gather(np.array([flag])).any())


def _gather(value: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value))
