"""Every command answers an out-of-memory with what is held and what to change, and exits with 3."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import base
from launch import out_of_memory
from launch.planning import explainer
from moejax.models.config import ModelConfig

ROOT = Path(__file__).parents[2]
# A command with two flags that takes 4 PB, which no machine has.
PROGRAM = """
from absl import flags
from launch import cli, out_of_memory

flags.DEFINE_integer("batch_size", 32, "Rows.")
flags.DEFINE_string("dtype", None, "Of the weights.")

def main(argv):
    import jax.numpy as jnp
    held = jnp.ones((256, 1024))
    jnp.ones((1 << 50,)).block_until_ready()

cli.run(main)
"""


def test_a_command_that_runs_out_of_memory_says_what_to_do():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--compile_cache="],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 3, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: out of memory: RESOURCE_EXHAUSTED")
    assert "memory held" in lines and "  0.00 GiB in arrays float32[256,1024]" in lines
    assert "  1. a smaller --batch_size: fewer rows at a time: slower, the same results" in lines
    assert any("--dtype=bfloat16" in line for line in lines)
    assert "Traceback" not in done.stderr


def test_which_errors_count():
    with pytest.raises(RuntimeError) as caught:
        jnp.ones((1 << 50,)).block_until_ready()
    assert out_of_memory.is_out_of_memory(caught.value)
    assert out_of_memory.is_out_of_memory(MemoryError("Unable to allocate 3.2 GiB"))
    assert out_of_memory.is_out_of_memory(ValueError("RESOURCE_EXHAUSTED: Out of memory"))
    assert not out_of_memory.is_out_of_memory(ValueError("out of memory of last year"))
    assert not out_of_memory.is_out_of_memory(RuntimeError("out of memory of last year"))
    assert not out_of_memory.is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: a bug"))


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 123456 bytes.", 123456),
        ("RESOURCE_EXHAUSTED: Failed to allocate 1.5GiB, limit 4", int(1.5 * 2**30)),
        ("RESOURCE_EXHAUSTED: nothing said", None),
    ],
)
def test_bytes_that_were_asked_for(message, asked):
    assert out_of_memory._asked_bytes(message) == asked


def test_a_training_run_is_explained_in_terms_of_its_config():
    config = base.get_config()
    config.train.steps, config.train.batch_size, config.data.seq_len = 1, 4096, 512
    model = ModelConfig("llama", 512, 2, 64, 128, 4, 2, 16)
    lines = explainer(config, model)(20 * 2**30)
    assert lines[0].startswith("HBM per device") and any("too much" in line for line in lines)
    assert any("--config.train.accumulation=" in line for line in lines), lines
    assert "fits" in lines[-1]


@pytest.mark.slow
def test_of_a_run_that_trains_a_tenth_only_that_has_state():
    """As of ESFT's experts."""
    config = base.get_config()
    config.train.steps, config.train.batch_size, config.data.seq_len = 1, 64, 512
    model = ModelConfig("llama", 200_000, 2, 512, 1024, 8, 8, 64)

    def gradients(share):
        lines = explainer(config, model, share)(20 * 2**30)
        return float(next(line for line in lines if "gradients" in line).split()[1])

    assert 0 < gradients(0.1) < 0.2 * gradients(1.0)
