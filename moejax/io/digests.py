"""Hashes of files out of the bytes that a reader takes of them anyway: nothing is read twice.

XXH3 with 128 bits: it tells files apart and is no proof against forgery. SHA-256 would take longer
than all the rest of a mixture (0.56 s a GB; this 0.05).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

_READ_BYTES = 1 << 18


def hash_file(path: Path) -> str:
    """The hash of a whole file, in hexadecimal."""
    return _File(path).whole()


class Digests:
    """Hashes of files, each begun where its reader begins and ended with what was not read.

    Bytes in the order of the file are hashed as they come; where the reader leaves some out they
    are read here. So a hash is of the very bytes that were used. Files may be read by several
    threads, one file by one.
    """

    def __init__(self) -> None:
        self._files: dict[Path, _File] = {}

    def saw(self, path: Path, start: int, part: np.ndarray) -> None:
        """Takes a file's bytes from `start` on, uint8 [N]."""
        file = self._files.setdefault(path, _File(path))
        file.read_to(start)
        file.update(part[max(0, file.num_hashed - start) :])

    def of(self, path: Path) -> str:
        """The hash of a file, in hexadecimal; of one that nobody read too."""
        return self._files.setdefault(path, _File(path)).whole()


class _File:
    """A file's hash so far, and of how many bytes it is."""

    def __init__(self, path: Path):
        self.path, self.digest, self.num_hashed = path, xxhash.xxh3_128(), 0

    def update(self, part: np.ndarray) -> None:
        self.digest.update(part.data)
        self.num_hashed += part.nbytes

    def whole(self) -> str:
        self.read_to(None)
        return self.digest.hexdigest()

    def read_to(self, end: int | None) -> None:
        """Hashes what lies before `end`, or all that is left, out of the file."""
        if end is not None and end <= self.num_hashed:
            return
        buffer = np.empty(_READ_BYTES, np.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.num_hashed)
            while end is None or self.num_hashed < end:
                most = _READ_BYTES if end is None else min(_READ_BYTES, end - self.num_hashed)
                num_read = file.readinto(buffer[:most].data)
                if not num_read:
                    return
                self.update(buffer[:num_read])
