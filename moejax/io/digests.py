"""Hashes of files out of the bytes that a reader takes of them anyway: nothing is read twice."""

from __future__ import annotations

import collections
import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

# Bytes that may wait for the hashing thread, or one part: it is slower than reading out of a cache.
_MOST_WAITING = 16 << 20
_READ_BYTES = 1 << 18


class Digests:
    """SHA-256 of files, each begun where its reader begins and ended with what was not read.

    Bytes in the order of the file are hashed as they lie in memory, by a thread beside the reader;
    where it leaves some out they are read here. So a hash is of the very bytes that were used.
    """

    def __init__(self) -> None:
        self._files: dict[Path, _File] = {}
        self._thread = ThreadPoolExecutor(1)
        self._waiting: collections.deque[tuple[Future[None], int]] = collections.deque()
        self._num_waiting = 0

    def saw(self, path: Path, start: int, part: np.ndarray) -> None:
        """Takes a file's bytes from `start` on, uint8 [N]; nobody may write to them any more."""
        self._waiting.append((self._thread.submit(self._take, path, start, part), part.nbytes))
        self._num_waiting += part.nbytes
        while self._num_waiting > _MOST_WAITING and len(self._waiting) > 1:
            hashed, num_bytes = self._waiting.popleft()
            self._num_waiting -= num_bytes
            hashed.result()

    def of(self, path: Path) -> str:
        """The hash of a file, in hexadecimal; of one that nobody read too."""
        return self._thread.submit(self._finish, path).result()

    def _take(self, path: Path, start: int, part: np.ndarray) -> None:
        file = self._file(path)
        file.read_to(start)
        file.update(part[max(0, file.num_hashed - start) :])

    def _finish(self, path: Path) -> str:
        file = self._file(path)
        file.read_to(None)
        return file.digest.hexdigest()

    def _file(self, path: Path) -> _File:
        if path not in self._files:
            self._files[path] = _File(path)
        return self._files[path]


class _File:
    """A file's hash so far, and of how many bytes it is."""

    def __init__(self, path: Path):
        self.path, self.digest, self.num_hashed = path, hashlib.sha256(), 0

    def update(self, part: np.ndarray) -> None:
        self.digest.update(part.data)
        self.num_hashed += part.nbytes

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
