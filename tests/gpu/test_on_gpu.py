"""What is for NVIDIA GPUs, run on one: kernels by their definitions, training that resumes.

    tests/run --gpu

Skipped, and said so, elsewhere.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.precision import TOLERANCE
from moejax.ops.attention import AttentionSpec, Visible, attention
from moejax.ops.grouped_matmul import chosen, grouped_matmul
from moejax.ops.grouped_matmul_ref import grouped_matmul_ref
from moejax.ops.sparse_ffn import sparse_ffn
from moejax.ops.sparse_matmul import sparse_matmul
from tests import tiny_run
from tests.commands import ROOT

pytestmark = pytest.mark.gpu
SIZES = {
    "even": [128] * 4,
    "ragged": [129, 31, 0, 3, 132, 5, 0],
    "one": [0, 0, 77],
    "none": [0, 0, 0],
    "large": [700, 130, 64, 1, 900, 260, 0, 511],
}


def draw(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def close(got, wanted, dtype):
    """Norm of the difference over the norm, by the dtype's tolerance."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape and np.isfinite(got).all()
    assert np.linalg.norm(got - wanted) <= TOLERANCE[dtype] * max(np.linalg.norm(wanted), 1e-30)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(72, 200), (512, 384), (256, 1408)])
@pytest.mark.parametrize("case", SIZES)
def test_grouped_products_and_gradients_are_their_definition(case, shape, dtype):
    """Twice, to the same bits; rows past the groups hold NaN and stay out."""
    sizes, (k, n) = SIZES[case], shape
    num_rows = sum(sizes) + 70
    x, w = draw(num_rows, k, dtype=dtype), draw(len(sizes), k, n, seed=1, dtype=dtype)
    d_out = draw(num_rows, n, seed=2, dtype=dtype)
    groups = jnp.arange(len(sizes)) % 2 == 0

    @functools.partial(jax.jit, static_argnums=0)
    def run(kernel, x, w, d_out):
        out, pull = jax.vjp(lambda x, w: kernel(x, w, jnp.asarray(sizes)), x, w)
        return out, *pull(d_out)

    ours = functools.partial(grouped_matmul, implementation="gpu", groups=groups)
    holed = x.at[sum(sizes) :].set(jnp.nan)
    got, again = (run(ours, holed, w, d_out) for _ in range(2))
    exact = [a.astype("float32") for a in (x, w, d_out)]
    with jax.default_matmul_precision("highest"):
        oracle = functools.partial(grouped_matmul_ref, groups=groups)
        wanted = run(oracle, *exact)
    for one, same, right in zip(got, again, wanted, strict=True):
        assert one.dtype == dtype
        np.testing.assert_array_equal(one, same)
        close(one, right, dtype)


def test_a_gpu_takes_our_kernels():
    assert chosen(None) == "gpu"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 3, 5, 70])
@pytest.mark.parametrize(("gated", "activation"), [(True, jax.nn.silu), (False, jax.nn.gelu)])
def test_chosen_blocks_are_their_definition(batch, dtype, gated, activation):
    """gelu in its exact form too, which Pallas' Triton cannot compile."""
    if not gated:
        activation = functools.partial(activation, approximate=False)
    num_blocks, num_rows, size = 24, 64, 576
    params = {
        f"rows_{n}": draw(num_blocks, num_rows, size, seed=i) / 24
        for i, n in enumerate(("gate", "up", "down") if gated else ("up", "down"))
    }
    params |= {"b_up": draw(num_blocks, num_rows, seed=5)}
    x, kept = draw(batch, size, seed=6), jnp.asarray([7, 3, 23, 0, 7])
    weight = draw(batch, 5, seed=7)
    given = jax.tree.map(lambda a: a.astype(dtype), (params, x))

    def run(params, x, name):
        into = sparse_matmul(x, params["rows_up"], kept, implementation=name)
        whole = sparse_ffn(params, x, kept, activation, weight_BK=weight, implementation=name)
        return into, sparse_matmul(into, params["rows_down"], kept, implementation=name), whole

    got = jax.jit(functools.partial(run, name="gpu"))(*given)
    exact = jax.tree.map(lambda a: a.astype("float32"), given)
    with jax.default_matmul_precision("highest"):
        wanted = run(*exact, name="ref")
    for one, right in zip(got, wanted, strict=True):
        assert one.dtype == dtype
        close(one, right, dtype)


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_attention_is_the_dense_one(packed, window):
    """Eight heads, four groups of keys; three texts in a row, and padding that nobody reads."""
    num_batch, length = 2, 256
    q, k, v = (
        draw(num_batch, *d, 64, seed=i, dtype="bfloat16")
        for i, d in enumerate(((length, 8), (4, length), (4, length)))
    )
    ids = np.repeat([1, 2, 3], [100, 90, 66])
    visible = (
        Visible(segments_BT=jnp.asarray(np.tile(ids, (num_batch, 1)))) if packed else Visible()
    )
    d_out = draw(num_batch, length, 8, 64, seed=3, dtype="bfloat16")

    @functools.partial(jax.jit, static_argnums=0)
    def run(name, q, k, v, d_out):
        def mixed(q, k, v):
            spec = AttentionSpec(scale=0.125, implementation=name)
            return attention(q, k, v, visible, window, spec)

        out, pull = jax.vjp(mixed, q, k, v)
        return out, *pull(d_out)

    got = run("cudnn", q, k, v, d_out)
    with jax.default_matmul_precision("highest"):
        wanted = run("dense", *(a.astype("float32") for a in (q, k, v, d_out)))
    for one, right in zip(got, wanted, strict=True):
        close(one, right, "bfloat16")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_run.write(folder)
    return folder


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_training_resumes_bit_for_bit(tiny, tmp_path, model):
    """With XLA's deterministic flag, which conftest sets: the steps after a checkpoint, again."""

    def train(workdir):
        flags = ["--config.train.steps=6", "--config.compute.dtype=bfloat16"]
        done = subprocess.run(
            tiny_run.command(tiny, workdir, *flags, model=model),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    whole = train(tmp_path / "whole")
    assert train(tmp_path / "whole") == whole  # a finished run is read back
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for newest in (tmp_path / "cut" / "ckpt").glob("*6"):
        shutil.rmtree(newest)
    assert train(tmp_path / "cut") == whole
    assert train(tmp_path / "anew") == whole
