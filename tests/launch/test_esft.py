"""launch.esft as a user runs it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from configs.esft import base as esft_base
from launch import esft_train
from moejax.core.errors import InputError
from moejax.methods import score_files
from moejax.methods.expert_selection import ExpertScores
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig
from tests import commands

run = functools.partial(commands.run, "esft")


def arm(**train):
    """A config that trains all of a tiny mixture."""
    config = esft_base.get_config()
    config.train.update(train)
    config.method.name = "full"
    return config


def test_keys_of_training_are_read_or_refused(monkeypatch):
    seen = []
    monkeypatch.setattr(esft_train, "lm_loss", lambda *given: seen.extend(given[-2:]))
    config = arm(z_loss=0.5)
    config.compute.max_logit_mib = 3
    params: Any = {"embed": {"tokens": np.ones((2, 3), np.float32)}}
    made = esft_train.make_adaptation(config, params, None, None)
    esft_train.make_loss(config, None, made, None)(made.trainable, made.frozen, None, None)
    assert seen == [3 * 2**20, 0.5]
    for typo in ({"no_decay": "**/biass"}, {"lr_scale": "head/**=2"}):
        with pytest.raises(InputError, match=f"train.{next(iter(typo))} .* fits none of the 1"):
            esft_train.make_adaptation(arm(**typo), params, None, None)
    with pytest.raises(InputError, match="train.freeze 'embed/.*' is not read here"):
        esft_train.check_method(arm(freeze="embed/**"))


def test_the_best_is_not_kept_without_heldout_data(monkeypatch, tmp_path):
    model = SimpleNamespace(config=ModelConfig("llama", 8, 1, 8, 8, 1, 1, 8, moe=MoEConfig(4, 2)))
    rows = SimpleNamespace(train=[0] * 4, heldout=None)
    monkeypatch.setattr(esft_train, "load_any", lambda *_, **__: model)
    monkeypatch.setattr(esft_train, "load_rows", lambda *_: rows)
    monkeypatch.setattr(esft_train.multihost, "start", lambda: None)
    config = arm(steps=1, keep_best=True)
    config.model.source = "somewhere"
    with pytest.raises(InputError, match="train.keep_best needs held-out data"):
        esft_train.main({"config": config, "workdir": tmp_path / "run", "dry_run": False})


@pytest.fixture
def scored(tmp_path) -> Path:
    rows = np.array([[0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]])
    scores = ExpertScores((1, 2), (0, 1, 2, 3), {"token": rows, "gate": rows / 2})
    folder = tmp_path / "scores"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(score_files.summary_json(scores)))
    return folder


def test_select_writes_the_reference_s_schema(scored, tmp_path):
    out = tmp_path / "c.json"
    flags = ("--stage=select", f"--scores={scored}", "--score=token", f"--out={out}")
    done = run(*flags, "--threshold=0.5", "--round_decimals=4")
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == {
        "experts": {"1": [0, 2], "2": [0, 1]},
        "shared_experts": False,
        "non_expert_modules": False,
    }
    again = run(*flags, "--threshold=0.5")
    assert again.returncode == 2 and "exists" in again.stderr
    wrong = run(*flags, "--threshold=1.5", "--overwrite")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "(0, 1]" in wrong.stderr
    assert json.loads(out.read_text())["experts"]["1"] == [0, 2]


def test_report_draws_tasks_beside_each_other(scored, tmp_path):
    out = tmp_path / "report"
    done = run("--stage=report", f"--scores=a={scored},b={scored}", f"--out={out}", "--top_k=2")
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "report.json").read_text())
    assert [task["name"] for task in record["tasks"]] == ["a", "b"]
    assert record["overlap"] == [[2.0, 2.0], [2.0, 2.0]]
    text = (out / "report.html").read_text()
    assert text.count("<img") == 3 and (out / "overlap.png").stat().st_size > 5000
