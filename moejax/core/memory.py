"""How much memory this machine can still give."""

from __future__ import annotations

from pathlib import Path

from moejax.core.errors import InputError

GIB = 2**30


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
