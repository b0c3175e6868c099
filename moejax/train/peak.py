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

    One measured device times the number of devices (of a CPU, of processes): an upper bound. The
    budget is of products alone: compiling them, and loading a GPU's libraries, may take longer.
    Cached, so that a process measures once.
    """
    product = jax.jit(jnp.matmul)
    best, best_size, size, spent = 0.0, 0, 512, 0.0
    while True:
        x = jax.random.normal(jax.random.key(0), (size, size), dtype)
        product(x, x).block_until_ready()
        seconds = min(_timed(product, x, 1) for _ in range(3))
        last = seconds >= MIN_PRODUCT_S or size >= MAX_SIZE
        queued = max(1, round(MIN_PRODUCT_S / seconds))  # what dispatch takes hides behind others
        while True:
            took = _timed(product, x, queued)
            seconds, spent = min(seconds, took), spent + took * queued
            if not last or spent >= budget_s:
                break
        gflops = 2 * size**3 / seconds / 1e9
        if gflops > best:
            best, best_size = gflops, size
        if last or spent >= budget_s:
            break
        size *= 2
    device = jax.devices()[0]
    # Several CPU devices of a process are one and the same CPU.
    num = jax.process_count() if device.platform == "cpu" else jax.device_count()
    return Peak(best * num, dtype, best_size, device.device_kind)


def _timed(product, x, count: int) -> float:
    """Seconds of one of `count` products that are queued together."""
    start = time.perf_counter()
    for _ in range(count):
        made = product(x, x)
    made.block_until_ready()
    return (time.perf_counter() - start) / count
