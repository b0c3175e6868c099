"""Ways to compute one operation, by name: what may be asked for and where it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moejax.core.errors import InputError
from moejax.core.platform import platform


def checked(operation: str, name: str, names: Iterable[str], platforms: Mapping[str, str]) -> str:
    """The name asked for. platforms: where those run that do not run everywhere.

    Raises InputError for an unknown name, NotImplementedError for one of other devices.
    """
    if name not in names:
        raise InputError(
            f"{operation} has no implementation {name!r}: choose one of {', '.join(names)}."
        )
    needed = platforms.get(name, platform())
    if needed != platform():
        raise NotImplementedError(
            f"{operation}: {name!r} is compiled for {needed} devices and these are "
            f"{platform()}: take implementation=None, or the kernel itself with interpret=True."
        )
    return name
