"""What every test shares: one CPU device set-up, and a spoken reason for each test that is skipped.

`slow`, `parity`, `aot` and `gpu` tests are skipped here and not deselected, so that the closing
summary of pytest (-ra) names each with its reason.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.fake_devices import QUICK

# Before anything imports jax: the suite's numbers are those of a CPU, whatever the machine has.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "cuda" in os.environ["JAX_PLATFORMS"]:
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share the memory
os.environ.setdefault("XLA_FLAGS", QUICK)
# Workers and later runs share what is compiled, by its text, flags and versions: a file of tests
# takes a third of the time again. Not where libtpu is: what it writes beside a program is measured.
COMPILED = Path(__file__).parents[1] / ".jax_cache"
MOST_COMPILED = 2_000_000_000  # bytes, of programs and their earlier versions: then it starts anew
LACKS_LIBTPU = importlib.util.find_spec("libtpu") is None
if LACKS_LIBTPU and os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test may reach the network; a hub look-up then fails at once and by name.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts in the background so, and children inherit it: tests of ctrl-C
    # would wait for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)

PARITY_DIR = Path(__file__).parent / "parity"
MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
PARITY_REASON = f"parity: {' and '.join(MISSING)} not installed (BUILD.md, 'Live parity', says how)"
ON_GPU = "cuda" in os.environ["JAX_PLATFORMS"]
AOT_REASON = "aot: libtpu not installed (tests/run --aot makes an environment that has it)"
GPU_REASON = "gpu: no NVIDIA GPU (tests/run --gpu, on a machine that has one)"
SLOW_REASON = "slow: run with --slow"
# Linux lets a process map 65,530 regions; each compiled program takes a few, and a worker that has
# compiled some ten thousand dies of the next one without a word.
MOST_REGIONS = 20_000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--require_parity",
        action="store_true",
        help="fail, and do not skip, where torch or transformers is missing",
    )
    parser.addoption(
        "--require_aot", action="store_true", help="fail, and do not skip, where libtpu is missing"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        _forget_many_programs()
    if config.getoption("--require_parity") and MISSING:
        raise pytest.UsageError(f"--require_parity: {' and '.join(MISSING)} not installed")
    if config.getoption("--require_aot") and LACKS_LIBTPU:
        raise pytest.UsageError("--require_aot: libtpu not installed")


def _forget_many_programs() -> None:
    files = COMPILED.iterdir() if COMPILED.is_dir() else ()
    if sum(path.stat().st_size for path in files) > MOST_COMPILED:
        shutil.rmtree(COMPILED)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if PARITY_DIR in item.path.parents:
            item.add_marker(pytest.mark.parity)
        if MISSING and item.get_closest_marker("parity"):
            item.add_marker(pytest.mark.skip(reason=PARITY_REASON))
        if LACKS_LIBTPU and item.get_closest_marker("aot"):
            item.add_marker(pytest.mark.skip(reason=AOT_REASON))
        if not ON_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=GPU_REASON))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason=SLOW_REASON))


@pytest.fixture(autouse=True, scope="module")
def few_memory_regions() -> Iterator[None]:
    """Forgets compiled programs after a file of tests, once there are very many."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > MOST_REGIONS:
        sys.modules["jax"].clear_caches()
        gc.collect()
