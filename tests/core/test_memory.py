"""When a process keeps the memory it frees, and what it says when there is too little."""

from __future__ import annotations

import types

import pytest

from moejax.core import memory
from moejax.core.errors import InputError


@pytest.mark.parametrize(
    ("cores", "free_gib", "kept"), [(2, 20, True), (64, 20, False), (2, 8, False), (None, 20, True)]
)
def test_freed_memory_is_kept_where_it_is_plenty_and_cores_are_few(
    monkeypatch, cores, free_gib, kept
):
    calls = {}
    library = types.SimpleNamespace(mallopt=calls.__setitem__)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(memory.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(memory, "available_bytes", lambda: free_gib * memory.GIB)
    memory.keep_freed()
    # Of malloc.h: M_ARENA_MAX one, M_MMAP_MAX none, M_TRIM_THRESHOLD the largest there is.
    assert calls == ({-8: 1, -4: 0, -1: -1} if kept else {})


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.keep_freed()
    memory.give_back()


def test_too_little_memory_is_said_with_both_numbers():
    with pytest.raises(InputError, match=r"needs about 1048576\.0 GiB .* are free: take less"):
        memory.require_memory(2**50, "take less")
