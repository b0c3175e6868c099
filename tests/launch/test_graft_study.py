"""The study of LLM Modules from end to end at a tiny size, stopped and gone on with."""

from __future__ import annotations

import csv
import json

import jax
import numpy as np
import pytest

from moejax.io.load import save_any
from moejax.io.loaded import Loaded
from moejax.models import transformer
from moejax.models.config import ModelConfig
from tests import commands
from tests.data.test_alignment import WORDS, tokenizers


@pytest.mark.slow
def test_every_stage_once(tmp_path):
    tokenizer = tokenizers()[0]
    config = ModelConfig("llama", tokenizer.vocab_size, 2, 16, 24, 2, 1, 8, max_position=128)
    params = jax.tree.map(np.asarray, transformer.init_params(config, jax.random.key(0)))
    save_any(Loaded(params, config, tokenizer), tmp_path / "source", "hf")
    rng = np.random.default_rng(0)
    words = [w for w in WORDS if w.isascii() and w.strip()]
    for part in ("test", "valid"):
        articles = [f" = A {i} = \n \n {' '.join(rng.choice(words, 60))} \n" for i in range(12)]
        (tmp_path / f"wikitext2_{part}.tokens.txt").write_text("\n".join(articles))
    workdir = tmp_path / "study"
    asked = [
        "--config=configs/graft_study.py:tiny", f"--config.source={tmp_path}/source",
        f"--config.data.folder={tmp_path}", f"--workdir={workdir}",
    ]
    done = commands.run("graft_study", *asked)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((workdir / "table.csv").open()))
    arms = [row["arm"] for row in rows]
    assert arms[:3] == ["source alone", "target as it came", "own target as it came"]
    assert {"adapter", "bridge", "paper, unmasked", "paper, causal", "paper, free"} <= set(arms)
    by_arm = {row["arm"]: row for row in rows}
    assert float(by_arm["source alone"]["gap_closed"]) == 1.0
    assert float(by_arm["adapter"]["gap_closed"]) == 0.0
    sizes = [int(by_arm[name]["trained_params"]) for name in ("adapter", "bridge", "gkd")]
    assert max(sizes) - min(sizes) <= 66
    # The table comes from what is kept: without an arm it is made again, and only that arm runs.
    result = workdir / "arms" / "bridge" / "seed_0" / "result.json"
    kept = json.loads(result.read_text())
    result.unlink()
    done = commands.run("graft_study", *asked, "--stage=report")
    assert done.returncode == 0 and "| bridge |" not in done.stdout
    done = commands.run("graft_study", *asked)
    assert done.returncode == 0 and done.stdout.count("trained  ") == 1, done.stderr
    assert json.loads(result.read_text())["scores"] == kept["scores"]
    refused = commands.run("graft_study", *asked, "--config.gap=5.0")
    assert refused.returncode == 2 and "choose other texts" in refused.stderr
