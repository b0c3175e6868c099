"""When a process keeps the memory it frees, and what it says when there is too little."""

from __future__ import annotations

import types

import pytest

from moejax.core import memory
from moejax.core.errors import InputError


@pytest.fixture
def calls(monkeypatch) -> dict:
    """What is set on a machine of 2 cores without accelerators and with 20 GiB free."""
    found: dict = {}
    library = types.SimpleNamespace(mallopt=found.__setitem__)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(memory.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(memory.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(memory, "available_bytes", lambda: 20 * memory.GIB)
    monkeypatch.setattr(memory.resource, "getrlimit", lambda what: (-1, -1))
    monkeypatch.setattr(memory.resource, "setrlimit", found.__setitem__)
    return found


def test_freed_memory_is_kept_and_no_more_taken_than_is_free(calls):
    memory.keep_freed()
    # Of malloc.h: M_ARENA_MAX one, M_MMAP_MAX none, M_TRIM_THRESHOLD the largest there is.
    most, hard = calls.pop(memory.resource.RLIMIT_DATA)
    assert calls == {-8: 1, -4: 0, -1: -1}
    assert 20 * memory.GIB < most < 30 * memory.GIB and hard == -1


@pytest.mark.parametrize("why", ["cores", "accelerator", "memory"])
def test_freed_memory_goes_back_elsewhere(calls, monkeypatch, why):
    if why == "cores":
        monkeypatch.setattr(memory.os, "cpu_count", lambda: 64)
    elif why == "accelerator":
        monkeypatch.setattr(memory.glob, "glob", lambda pattern: [pattern])
    else:
        monkeypatch.setattr(memory, "available_bytes", lambda: 8 * memory.GIB)
    memory.keep_freed()
    assert not calls


def test_a_compiler_gives_back_and_many_cores_keep_their_heaps(calls, monkeypatch):
    memory.return_freed()
    assert calls == {-8: 2, -3: 256 << 10, -1: 256 << 10}  # M_ARENA_MAX, M_MMAP_, M_TRIM_THRESHOLD
    calls.clear()
    monkeypatch.setattr(memory.os, "cpu_count", lambda: 64)
    memory.return_freed()
    assert set(calls) == {-3, -1}


def test_without_glibc_nothing_happens(calls, monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed()
    memory.return_freed()
    memory.give_back()
    assert not calls


def test_too_little_memory_is_said_with_both_numbers():
    with pytest.raises(InputError, match=r"needs about 1048576\.0 GiB .* are free: take less"):
        memory.require_memory(2**50, "take less")
