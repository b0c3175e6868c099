"""How much memory this machine can still give."""

from __future__ import annotations

import ctypes
import gc
import glob
import os
import resource
from pathlib import Path

from moejax.core.errors import InputError

GIB = 2**30
# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_MAX_CORES, _MIN_BYTES = 16, 12 * GIB
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")


def available_bytes() -> int:
    """Bytes that can be had without swapping and within the container's limit (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    available = fields.get("MemAvailable", fields["MemTotal"])
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, int(limit) - used)


def require_memory(num_bytes: int, remedy: str) -> None:
    """Raises InputError, with both numbers and the remedy, unless so many bytes can be had."""
    available = available_bytes()
    if available < num_bytes:
        raise InputError(
            f"this needs about {num_bytes / GIB:.1f} GiB of memory and {available / GIB:.1f} GiB "
            f"are free: {remedy}"
        )


def keep_freed() -> bool:
    """Lets this process keep the memory it frees, for what it allocates next; says whether.

    glibc gives every large array back to the system and asks for it again, page by page: a training
    step of SmolLM2-135M on two cores of a virtual machine took 315,000 page faults and 12% more
    processor time so. The process stays as large as it ever was, up to twice what it needs, so this
    is for machines with few cores (one heap for all threads), no accelerator and memory to spare;
    elsewhere, and without glibc, nothing happens. What is free now becomes a
    limit: to ask for more is an error that can be answered, and no reason to be killed. Call it
    before threads begin, and `give_back` between large pieces of work of different shapes: holes
    that fit nothing add up.
    """
    change, free = getattr(ctypes.CDLL(None), "mallopt", None), available_bytes()
    small = (os.cpu_count() or 1) <= _MAX_CORES and not any(map(glob.glob, _ACCELERATORS))
    if change is None or not small or free < _MIN_BYTES:
        return False
    # The heaps that glibc makes for threads take no large arrays: those would be mapped even so.
    change(_ARENA_MAX, 1)
    change(_MMAP_MAX, 0)
    change(_TRIM_THRESHOLD, -1)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + free
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    return True


def keep_parts() -> None:
    """Lets this process keep up to 64 MB of what it frees: parts of a few megabytes on their way.

    Else glibc may give each back to the system and ask for the next one page by page. Larger arrays
    are given back as ever; without glibc nothing happens.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is not None:
        change(_MMAP_THRESHOLD, 32 << 20)
        change(_TRIM_THRESHOLD, 64 << 20)


def return_freed() -> None:
    """Lets this process give back at once what it frees of 256 KB or more.

    For a compiler: it allocates much on several threads, little of it twice, and one heap would
    hold them up. A machine of few cores gets two. Call it before threads begin; without glibc
    nothing happens.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is not None:
        if (os.cpu_count() or 1) <= _MAX_CORES:
            change(_ARENA_MAX, 2)
        change(_MMAP_THRESHOLD, 256 << 10)
        change(_TRIM_THRESHOLD, 256 << 10)


def give_back() -> None:
    """Gives the system what this process has freed and kept; a no-op without glibc."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
