"""The main job on a model of two tiny layers that speaks SmolLM2's tokens."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from launch.smollm2 import gguf_path
from moejax.core import tree
from moejax.io.gguf import read_metadata
from moejax.io.load import load_any, save_any
from moejax.io.loaded import Loaded
from moejax.io.tokenizer import Tokenizer
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.report import MODELS
from tests import commands
from tests.commands import Done


def run(folder: Path, *flags: str) -> Done:
    return commands.run(
        *("quickstart", f"--model={folder / 'model'}", f"--out={folder / 'out'}"),
        *("--steps=2", "--eval_examples=4", "--max_new_tokens=2", *flags),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("quickstart")
    tokenizer = Tokenizer.from_gguf_metadata(read_metadata(gguf_path()))
    config = ModelConfig("llama", tokenizer.vocab_size, 2, 16, 24, 2, 1, 8, tie_embeddings=True)
    params = transformer.init_params(config, jax.random.key(0))
    save_any(Loaded(jax.tree.map(np.asarray, params), config, tokenizer), path / "model", "hf")
    return path


@pytest.fixture(scope="module")
def report(folder):
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert "read back: every parameter equal" in done.stdout and "in all" in done.stdout
    return json.loads((folder / "out" / "report.json").read_text())


def test_every_model_is_judged_on_the_same_tokens(report):
    rows = {row["model"]: row for row in report["rows"]}
    assert tuple(rows) == MODELS
    assert len({row["nll_tokens"] for row in rows.values()}) == 1
    assert {row["pass_at_1_n"] for row in rows.values()} == {32}
    assert rows["moe"]["params"] > rows["moe"]["active_params"] > rows["base"]["params"]
    merged = rows["merged_learned"]
    assert merged["train_tokens"] == rows["sft_dense"]["train_tokens"] > rows["moe"]["train_tokens"]
    assert [d["minus"] for d in report["differences"]] == [
        "sft_dense",
        "merged_uniform",
        "shared_only",
    ]


def test_the_dense_rival_reads_the_same_batches_in_the_same_order(folder, report):
    def losses(stage):
        records = json.loads((folder / "out" / "stats" / f"{stage}.json").read_text())["records"]
        return [record["nll"] for record in records], [r["token_count"] for r in records]

    dense, moe, merge = (losses(stage) for stage in ("sft_dense", "moe", "merge"))
    assert dense[1] == moe[1] + merge[1]
    # Upcycling changes nothing, so the first batch costs both the same.
    assert moe[0][0] == pytest.approx(dense[0][0], rel=1e-5)


def test_what_is_exported_is_the_merge_of_what_was_tuned(folder, report):
    exported = load_any(folder / "out" / "hf")
    assert exported.config.moe is None
    operations = [entry["op"] for entry in exported.lineage]
    assert [op for op in operations if op not in ("import", "export")] == [
        "upcycle",
        "train",
        "merge",
    ]
    lineage = json.loads((folder / "out" / "lineage.json").read_text())
    assert lineage == json.loads((folder / "out" / "hf" / "lineage.json").read_text())
    moe = load_any(folder / "out" / "models" / "moe")
    embedding = tree.flatten(exported.params)["embed/tokens"]
    assert embedding.tobytes() == tree.flatten(moe.params)["embed/tokens"].tobytes()


def test_again_it_redoes_nothing_and_says_the_same(folder, report):
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert "moe: done before" in done.stdout and "step 1/2" not in done.stdout
    again = json.loads((folder / "out" / "report.json").read_text())
    assert again["rows"] == report["rows"] and again["differences"] == report["differences"]


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--experts=5"], "experts (4 there, 5 here)"),
        (["--top_k=5"], "top_k=5 is more than num_experts=4"),
        (["--model=/no/such/folder"], "/no/such/folder is missing"),
        (["--steps=0"], "--steps=0"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(folder, report, flags, message):
    before = sorted((folder / "out").rglob("*"))
    done = run(folder, *flags)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr
    assert sorted((folder / "out").rglob("*")) == before


def test_a_dry_run_prints_the_plan_and_writes_nothing(folder, tmp_path):
    done = run(folder, "--dry_run", f"--out={tmp_path / 'new'}")
    assert done.returncode == 0 and "MoE SFT, 2 steps" in done.stdout
    assert not (tmp_path / "new").exists()
