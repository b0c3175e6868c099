"""What a traced program is for: this machine's devices, unless a compiler says otherwise."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_compiled_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """Says "cpu", "gpu" or "tpu": of what `compiling_for` names, else of jax's default devices."""
    return _compiled_for.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Lets `platform` answer `name` inside, for programs that will run on other devices."""
    token = _compiled_for.set("gpu" if name in ("cuda", "rocm") else name)
    try:
        yield
    finally:
        _compiled_for.reset(token)
