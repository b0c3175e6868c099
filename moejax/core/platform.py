"""What a traced program is for: this machine's devices, unless a compiler says otherwise."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_compiled_for: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar(
    "platform", default=None
)


def platform() -> str:
    """Says "cpu", "gpu" or "tpu": of what `compiling_for` names, else of jax's default devices."""
    named = _compiled_for.get()
    return named[0] if named else jax.default_backend()


def device_kind() -> str:
    """The device's own name ("TPU v5 lite"), chosen like `platform`; may be empty."""
    named = _compiled_for.get()
    return named[1] if named else jax.devices()[0].device_kind


@contextlib.contextmanager
def compiling_for(name: str, kind: str = "") -> Iterator[None]:
    """Lets `platform` and `device_kind` answer these inside, for programs of other devices."""
    token = _compiled_for.set(("gpu" if name in ("cuda", "rocm") else name, kind))
    try:
        yield
    finally:
        _compiled_for.reset(token)
