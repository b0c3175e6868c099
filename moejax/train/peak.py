"""How fast this machine multiplies matrices: the 100% that a run's speed is given against."""

from __future__ import annotations

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

# A product shorter than this mostly measures dispatch; a longer one wastes the user's time.
MIN_PRODUCT_S = 0.01
MAX_SIZE = 8192


@dataclasses.dataclass(frozen=True)
class Peak:
    """gflops: the best rate seen, in 1e9 floating-point operations per second, all devices."""

    gflops: float
    dtype: str
    size: int
    device: str


@functools.lru_cache(maxsize=8)
def measure_gemm_peak(dtype: str = "float32", budget_s: float = 0.5) -> Peak:
    """Times square products (2 n^3 operations) of growing n and keeps the best rate.

    One measured device times the number of devices (of a CPU, of processes): an upper bound.
    Cached, so that a process measures once.
    """
    product = jax.jit(jnp.matmul)
    best, best_size, size = 0.0, 0, 512
    deadline = time.perf_counter() + budget_s
    while True:
        x = jnp.ones((size, size), dtype)
        product(x, x).block_until_ready()
        seconds = min(_timed(product, x) for _ in range(3))
        while seconds >= MIN_PRODUCT_S and time.perf_counter() < deadline:
            seconds = min(seconds, _timed(product, x))
        gflops = 2 * size**3 / seconds / 1e9
        if gflops > best:
            best, best_size = gflops, size
        if seconds >= MIN_PRODUCT_S or size >= MAX_SIZE or time.perf_counter() >= deadline:
            break
        size *= 2
    device = jax.devices()[0]
    # Several CPU devices of a process are one and the same CPU.
    num = jax.process_count() if device.platform == "cpu" else jax.device_count()
    return Peak(best * num, dtype, best_size, device.device_kind)


def _timed(product, x) -> float:
    start = time.perf_counter()
    product(x, x).block_until_ready()
    return time.perf_counter() - start
