"""launch.esft as a user runs it."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from moejax.methods import score_files
from moejax.methods.expert_selection import ExpertScores
from tests import commands

run = functools.partial(commands.run, "esft")


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
