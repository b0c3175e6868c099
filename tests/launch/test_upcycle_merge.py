"""upcycle and merge as a user runs them: there and back again, learned, searched, and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import quickstart_merge
from launch.settings import checked
from moejax.core import tree
from moejax.io.load import load_any, save_any
from moejax.io.loaded import Loaded
from moejax.io.tokenizer import Tokenizer
from moejax.methods import merge as merging
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig
from tests import commands
from tests.tiny_tokenizer import gguf_fields


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny dense model, a mixture whose experts differ, and forty conversations."""
    path = tmp_path_factory.mktemp("merge")
    tokenizer = Tokenizer.from_gguf_metadata(gguf_fields())
    config = ModelConfig("llama", tokenizer.vocab_size, 2, 16, 24, 2, 1, 8, max_position=64)
    params = transformer.init_params(config, jax.random.key(0))
    save_any(Loaded(params, config, tokenizer), path / "dense", "hf")
    experts = ModelConfig.from_json(
        config.to_json() | {"moe": {"num_experts": 3, "top_k": 3, "noise": False}}
    )
    drifted = transformer.init_params(experts, jax.random.key(1))
    save_any(Loaded(drifted, experts, tokenizer), path / "drifted", "orbax")
    rows = [{"prompt": f"hello {i}", "completion": f"{i} ab\n"} for i in range(40)]
    (path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


def data_flags(folder: Path) -> list[str]:
    return [
        "--config=configs/quickstart_merge.py",
        f"--config.data.source={folder / 'data.jsonl'}",
        "--config.data.seq_len=64",
    ]


# The command on a machine that has no memory left when it trains.
FULL = """
import sys

from launch import cli, merge

def fit(*args, **kwargs):
    raise MemoryError("Unable to allocate 900 GiB")

merge.fit = fit
cli.run(merge.main, freed="parts")
"""


def test_a_merge_out_of_memory_says_what_would_make_its_step_fit(folder):
    flags = [
        *data_flags(folder), f"--source={folder / 'drifted'}", "--config.train.batch_size=4",
        f"--target={folder / 'full'}", f"--workdir={folder / 'full_run'}", "--config.train.steps=3",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", FULL, *flags, "--compile_cache="],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: out of memory: Unable to allocate 900 GiB")
    parts = [line for line in lines if "--config.train.accumulation=" in line]
    assert "=2: about" in parts[0] and "=4: about" in parts[1]
    needed = [float(line.split("about ")[1].split()[0]) for line in parts]
    assert needed[1] <= needed[0]
    assert any(line.startswith("memory   about") and "frozen" in line for line in lines)
    assert "--config.model.dtype=bfloat16 --config.compute.dtype=bfloat16" in done.stderr
    assert lines[-1].startswith("  a device with more than")
    assert not (folder / "full").exists()


def test_upcycled_and_merged_untouched_is_the_dense_model(folder):
    done = commands.run(
        "upcycle", f"--source={folder / 'dense'}", f"--target={folder / 'moe'}",
        "--experts=4", "--top_k=3", "--gate=linear", "--seed=7",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    moe = load_any(folder / "moe")
    assert moe.config.moe == MoEConfig(4, 3, gate="linear")
    assert moe.lineage[-2]["op"] == "upcycle" and moe.lineage[-2]["args"]["seed"] == 7
    done = commands.run(
        "merge", f"--source={folder / 'moe'}", f"--target={folder / 'back'}", "--mode=uniform"
    )
    assert done.returncode == 0, done.stderr
    dense, back = load_any(folder / "dense"), load_any(folder / "back")
    assert tree.diff(dense.params, back.params) == []
    assert back.config == dense.config
    assert [entry["op"] for entry in back.lineage][-4:] == ["upcycle", "export", "merge", "export"]


def test_a_learned_merge_is_written_and_says_how_far_it_went(folder):
    flags = [
        *data_flags(folder), f"--source={folder / 'drifted'}",
        f"--target={folder / 'learned'}", f"--workdir={folder / 'run'}",
        "--config.train.steps=3", "--per_matrix",
    ]  # fmt: skip
    done = commands.run("merge", *flags)
    assert done.returncode == 0, done.stderr
    assert "step 3/3  loss" in done.stdout and "of equal" in done.stdout
    saved = json.loads((folder / "run" / "coefficients.json").read_text())
    coefficients = jax.tree.map(np.asarray, {"0": {"alpha": np.asarray(saved["0"]["alpha"])}})
    assert coefficients["0"]["alpha"].shape == (2, 3, 2)
    drifted, learned = load_any(folder / "drifted"), load_any(folder / "learned")
    wanted, _ = merging.merge_experts(
        drifted.params, drifted.config, coefficients, merging.MergeConfig(per_matrix=True)
    )
    for path, leaf in tree.flatten(wanted).items():
        np.testing.assert_allclose(tree.flatten(learned.params)[path], leaf, atol=1e-6)
    again = commands.run("merge", *flags, "--overwrite")
    assert again.returncode == 0 and "step 3/3  loss" not in again.stdout, again.stderr


def test_the_grid_keeps_the_lambda_of_the_lowest_loss(folder):
    done = commands.run(
        "merge", *data_flags(folder), f"--source={folder / 'drifted'}",
        f"--target={folder / 'grid'}", "--mode=grid", "--lams=0.2,1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    merged = load_any(folder / "grid")
    found = merged.lineage[-2]["results"]
    assert merged.lineage[-2]["args"]["lam"] == found["lam"]
    assert found["heldout_nll"][f"{found['lam']:g}"] == min(found["heldout_nll"].values())


def test_dry_runs_write_nothing(folder):
    done = commands.run(
        "upcycle", f"--source={folder / 'dense'}", f"--target={folder / 'none'}", "--dry_run"
    )
    assert done.returncode == 0 and "layers/0/moe/router/w_hidden [2, 16, 7]" in done.stdout
    assert "GFLOP" in done.stdout and "dry run" in done.stdout
    done = commands.run(
        "merge", *data_flags(folder), f"--source={folder / 'drifted'}",
        f"--target={folder / 'none'}", "--dry_run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "FLOPs each; 4 coefficients" in done.stdout and "GiB" in done.stdout
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        ("upcycle", ["--source=dense", "--experts=4", "--top_k=5"], "top_k=5 is more than num"),
        ("upcycle", ["--source=drifted"], "already has 3 experts"),
        ("upcycle", ["--source=dense", "--gate=tree"], "mlp|linear"),
        ("merge", ["--source=dense", "--mode=uniform"], "no experts"),
        ("merge", ["--source=drifted", "--mode=uniform", "--lam=1.5"], "lam=1.5"),
        ("merge", ["--source=drifted"], "--config is missing"),
        ("merge", ["--source=drifted", "--config=configs/quickstart_merge.py"], "--workdir"),
        ("merge", ["--source=nowhere", "--mode=uniform"], "nowhere is missing"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_target_alone(folder, command, flags, words):
    flags = [flag.replace("--source=", f"--source={folder}/") for flag in flags]
    done = commands.run(command, *flags, f"--target={folder / 'untouched'}")
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (folder / "untouched").exists()


@pytest.mark.parametrize(
    ("key", "words"),
    [("freeze", "train.freeze 'embed/**' is not read here"), ("no_decay", "train.no_decay")],
)
def test_a_learned_merge_reads_or_refuses_patterns(folder, key, words):
    done = commands.run(
        "merge", *data_flags(folder), f"--source={folder / 'drifted'}",
        f"--target={folder / 'none'}", "--dry_run", f"--config.train.{key}=embed/**",
    )  # fmt: skip
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done


def test_the_config_has_the_known_keys():
    config = quickstart_merge.get_config()
    assert checked(config) is config
