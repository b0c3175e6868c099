"""What a traced program is for: this machine's devices, unless a compiler says otherwise."""

import contextlib
import contextvars
import importlib.metadata
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

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


def takes_gpu_kernels() -> bool:
    """Whether a "gpu" has the shared memory that our kernels' tiles take: H100, H200, B200.

    These are NVIDIA's of compute capability 9 and 10. Ahead of time it has: the H100 is the only
    GPU that programs are compiled for elsewhere.
    """
    if platform() != "gpu" or jax.default_backend() != "gpu":
        return platform() == "gpu"
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return capability.partition(".")[0] in ("9", "10")


def versions(*packages: str) -> dict[str, str]:
    """Of installed packages, by name: those that are not are left out, moejax is named even so."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package == "moejax":
                found[package] = "not installed (source tree)"
    return found


@contextlib.contextmanager
def compiling_for(name: str, kind: str = "") -> Iterator[None]:
    """Lets `platform` and `device_kind` answer these inside, for programs of other devices."""
    token = _compiled_for.set(("gpu" if name in ("cuda", "rocm") else name, kind))
    try:
        yield
    finally:
        _compiled_for.reset(token)


# Without these libtpu 0.0.42 runs no all-to-all and no all-gather beside a matrix product.
_TPU_OVERLAP = (
    "xla_tpu_enable_async_all_to_all",
    "xla_enable_async_all_gather",
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
)


def overlap_options(mesh: Mesh | None) -> dict[str, bool | str] | None:
    """Compiler options for programs on a mesh, so that collectives run beside arithmetic.

    For `jax.jit`, where they go before what LIBTPU_INIT_ARGS says. None where there is nothing to
    be told: on one device, and but for TPUs.
    """
    if mesh is None or mesh.size == 1 or mesh.devices.flat[0].platform != "tpu":
        return None
    return dict.fromkeys(_TPU_OVERLAP, "true")
