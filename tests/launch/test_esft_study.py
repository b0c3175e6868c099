"""The study's every stage at a size that shows nothing but that they work, and going on."""

from __future__ import annotations

import csv

import pytest

from tests import commands

DATA = commands.ROOT.parent / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the study's data is not beside the checkout")
def test_the_tiny_study_goes_through_and_goes_on(tmp_path):
    def run():
        flags = ["--config=configs/esft/study.py:tiny", f"--workdir={tmp_path}"]
        return commands.run("esft_study", *flags, timeout_s=1800)

    done = run()
    assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / "table.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    esft = ["esft_token", "esft_gate", "esft_gradient"]
    assert list(rows) == ["frozen", "full", "lora", *esft, "random"]
    assert int(rows["random"]["trained_params"]) == int(rows["esft_token"]["trained_params"])
    result = tmp_path / "arms/esft_token/0.003/1/result.json"
    before = result.read_bytes()
    result.unlink()
    again = run()
    assert again.returncode == 0, again.stderr[-2000:]
    assert result.read_bytes() == before
