"""train as a user runs it, and how a config becomes settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, quickstart_moe, quickstart_sft, xft_deepseek_1b
from launch.settings import checked, forward_options, heldout_nll, preset, train_config, with_dtype
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.evals import nll
from moejax.io.load import load_any, save_any
from moejax.io.loaded import Loaded
from moejax.io.tokenizer import Tokenizer
from moejax.methods.upcycle import upcycle
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig
from tests import commands
from tests.commands import Done
from tests.tiny_tokenizer import gguf_fields


def run(folder: Path, *flags: str) -> Done:
    return commands.run(
        *("train", "--config=configs/quickstart_sft.py", "--config.train.steps=3"),
        *(f"--config.model.source={folder / 'model'}", f"--workdir={folder / 'run'}"),
        *(f"--config.data.source={folder / 'data.jsonl'}", "--config.data.seq_len=64"),
        *flags,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of two tiny layers with a tokenizer, upcycled, and forty conversations."""
    path = tmp_path_factory.mktemp("train")
    tokenizer = Tokenizer.from_gguf_metadata(gguf_fields())
    config = ModelConfig("llama", tokenizer.vocab_size, 2, 16, 24, 2, 1, 8, max_position=64)
    params = transformer.init_params(config, jax.random.key(0))
    moe_params, moe_config = upcycle(params, config, MoEConfig(3, 2), jax.random.key(1))
    save_any(Loaded(moe_params, moe_config, tokenizer), path / "model", "orbax")
    rows = [{"prompt": f"hello {i}", "completion": f"{i} ab\n"} for i in range(40)]
    (path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_moe_is_tuned_written_and_resumed(folder):
    done = run(folder, "--config.train.lr=0.01", "--config.train.accumulation=2")
    assert done.returncode == 0, done.stderr
    assert "step 3/3  loss" in done.stdout and "MFU" in done.stdout and "load" in done.stdout
    before, after = load_any(folder / "model"), load_any(folder / "run" / "model")
    assert after.config == before.config
    changed = {line.split(":")[0] for line in tree.diff(before.params, after.params)}
    assert changed == set(tree.flatten(before.params))
    assert after.lineage[-2]["op"] == "train" and after.lineage[-2]["results"]["step"] == 3
    same = ("--config.train.lr=0.01", "--config.train.accumulation=2")
    exported = run(folder, *same, "--export_step=3")
    assert exported.returncode == 0, exported.stderr
    of_step = load_any(folder / "run" / "model_step_3")
    assert tree.diff(of_step.params, after.params) == []
    again = run(folder, *same)
    assert again.returncode == 0, again.stderr
    assert "step 3/3  loss" not in again.stdout
    assert tree.diff(load_any(folder / "run" / "model").params, after.params) == []
    other = run(folder, "--config.train.lr=0.02", "--config.train.accumulation=2")
    assert other.returncode == 2
    assert "train.optim.lr (0.01 there, 0.02 here)" in other.stderr
    assert other.stderr.count("\n") == 1


def test_a_dry_run_writes_nothing(folder):
    done = run(folder, f"--workdir={folder / 'none'}", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "FLOPs in all" in done.stdout and "GiB" in done.stdout and "dry run" in done.stdout
    assert not (folder / "none").exists()


def test_an_unknown_key_is_one_line_with_the_valid_ones(folder):
    done = run(folder, "--config.train.lrr=1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "train.lr," in done.stderr and "train.warmup_share" in done.stderr


def test_a_config_file_with_a_missing_or_unknown_key():
    config = base.get_config()
    with config.unlocked():
        config.train.extra = 1
    with pytest.raises(InputError, match=r"unknown train\.extra; valid keys: .*train\.lr"):
        checked(config)
    config = base.get_config()
    with config.unlocked():
        del config.train["lr"]
    with pytest.raises(InputError, match=r"lacks train\.lr"):
        checked(config)
    with pytest.raises(InputError, match="--config is missing"):
        checked(None)


def test_epochs_become_steps_and_shares_become_warmup():
    config = xft_deepseek_1b.get_config("moe")
    settings = train_config(config, 110_000)
    assert settings.steps == 6875 and settings.optim.warmup_steps == 500
    config.train.epochs = 0.0
    with pytest.raises(InputError, match="train.steps is 0 and train.epochs 0"):
        train_config(config, 110_000)


@pytest.mark.parametrize(
    "section, name, size, least",
    [("train", "batch_size", 0, 1), ("train", "accumulation", 0, 1), ("data", "seq_len", 1, 2)],
)
def test_a_size_below_its_least_is_refused_before_it_divides_anything(section, name, size, least):
    config = xft_deepseek_1b.get_config("moe")
    config[section][name] = size
    said = f"{section}.{name} is {size}: it must be {least} or more"
    for num_rows in (110_000, None):
        with pytest.raises(InputError, match=said):
            train_config(config, num_rows)


@pytest.mark.parametrize(
    "config",
    [
        base.get_config(),
        quickstart_sft.get_config(),
        quickstart_moe.get_config(),
        xft_deepseek_1b.get_config("sft"),
        xft_deepseek_1b.get_config("moe"),
        xft_deepseek_1b.get_config("merge"),
    ],
)
def test_every_config_has_the_known_keys(config):
    assert checked(config) is config


def test_evaluation_takes_a_microbatch_s_rows_and_logits(monkeypatch):
    config, seen = base.get_config(), {}
    config.train.update(batch_size=8, accumulation=4)
    config.compute.max_logit_mib = 3

    def evaluate(params, model, heldout, **given):
        seen.update(given)
        return nll.NllResult(("a",), np.array([6.0]), np.array([4]), "")

    monkeypatch.setattr(nll, "evaluate", evaluate)
    model: Any = None
    assert heldout_nll(config, {}, model, model, forward_options(config)) == 1.5
    assert (seen["batch_size"], seen["max_logit_bytes"]) == (2, 3 * 2**20)


def test_a_preset_gives_sizes():
    config = xft_deepseek_1b.get_config()
    config.model.source = "preset:deepseek-coder-1.3b"
    config.model.experts, config.model.top_k = 8, 6
    assert preset(config).moe == MoEConfig(8, 6)
    config.model.source = "preset:nothing"
    with pytest.raises(InputError, match="no preset 'nothing': there are deepseek-coder-1.3b"):
        preset(config)


def test_a_model_may_keep_its_dtype():
    config = base.get_config()
    assert with_dtype(config, None) is config
    config.model.dtype = "keep"
    params = {"a": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros(2, jnp.float32)}
    assert with_dtype(config, params).model.dtype == "bfloat16"
    assert config.model.dtype == "keep"


def test_a_compute_type_that_is_none():
    config = base.get_config()
    config.compute.dtype = "int8"
    with pytest.raises(InputError, match="'int8' is unknown: use float32"):
        forward_options(config)


def test_a_preset_is_planned_on_the_mesh_that_is_asked_for():
    """Rows split along their length are refused, with the length that one device reaches."""
    asked = ("--config.model.source=preset:smollm2-135m", "--dry_run", "--config.mesh.sequence=2")
    done = commands.run("train", "--config=configs/quickstart_sft.py", *asked)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "mesh.sequence=2: rows are not split along their length" in done.stderr
    found = re.search(r"reaches rows of at least ([\d,]+) tokens .* remat dots", done.stderr)
    assert found and int(found[1].replace(",", "")) > 128
    assert "compute.remat=full, compute.remat=offload" in done.stderr
