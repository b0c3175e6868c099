"""The study's every stage at a size that shows nothing but that they work, and going on."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from launch import esft_study_report as report
from tests import commands

DATA = commands.ROOT.parent / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the study's data is not beside the checkout")
def test_the_tiny_study_goes_through_and_goes_on(tmp_path):
    def run(*more):
        flags = ["--config=configs/esft/study.py:tiny", f"--workdir={tmp_path}", *more]
        return commands.run("esft_study", *flags, timeout_s=1800)

    done = run()
    assert done.returncode == 0, done.stderr[-2000:]
    study = json.loads((tmp_path / "study.json").read_text())
    rows = {row["method"]: row for row in study["rows"]}
    esft = ["esft_token", "esft_gate", "esft_gradient"]
    assert list(rows) == ["frozen", "full", "lora", *esft, "random"]
    assert rows["random"]["trained_params"] == rows["esft_token"]["trained_params"]
    assert "[19/19]" in done.stdout and (tmp_path / "plots/frontier.png").stat().st_size > 5000
    results = sorted(tmp_path.glob("arms/*/*/1/result.json"))
    before = [json.loads(path.read_text())["losses"] for path in results]
    assert len(results) == 6
    for path in results:
        path.unlink()
    changed = "--config.specialised_below=1.5"  # no run depends on it
    with ThreadPoolExecutor() as pool:  # two processes share the runs
        both = [job.result() for job in [pool.submit(run, changed) for _ in range(2)]]
    assert [again.returncode for again in both] == [0, 0], both[0].stderr + both[1].stderr
    assert [json.loads(path.read_text())["losses"] for path in results] == before


def _result(arm: str, rate: float, seed: int, target: float, other: float):
    rng = np.random.default_rng(seed)
    losses = {"a": target + rng.normal(0, 0.01, 8), "b": np.full(6, other), "c": np.full(8, 1.0)}
    both = {part: {n: list(v) for n, v in losses.items()} for part in ("validation", "test")}
    return {"arm": arm, "rate": rate, "seed": seed, "trained_params": 7, "losses": both}


def test_the_report_pairs_rows_and_takes_random_draws_as_one_method(tmp_path):
    tried = {"full": [_result("full", rate, 0, 2 - rate, 3.0) for rate in (0.1, 0.2)]}
    results = [_result("frozen", 0.0, 0, 2.0, 2.0)]
    for seed in (0, 1):
        results.append(_result("full", 0.2, seed, 1.0, 4.0))
        results.append(_result("esft_token", 0.1, seed, 1.1, 2.5))
        results += [_result(f"random_{i}", 0.1, seed, 1.5 + i / 10, 2.5) for i in range(2)]
    specialised = {"domains": ["a", "b"], "overlap": [[4.0, 1.0], [1.0, 4.0]]}
    report.write_report(tried, results, specialised, "a", tmp_path)

    study = json.loads((tmp_path / "study.json").read_text())
    rows = {row["method"]: row for row in study["rows"]}
    assert list(rows) == ["frozen", "full", "esft_token", "random"] and rows["random"]["runs"] == 4
    assert rows["full"]["others"]["mean"] == pytest.approx((4.0 + 1.0) / 2)
    gaps = {(d["method"], d["minus"]): d for d in study["differences"]}
    one = gaps["esft_token", "full"]
    assert one["others"]["mean"] == pytest.approx(-0.75) and one["others"]["verdict"] == "better"
    assert one["target"]["mean"] == pytest.approx(0.1) and one["target"]["verdict"] == "worse"
    # The same rows with the same noise: paired, nothing is left of it.
    assert one["target"]["high"] - one["target"]["low"] < 1e-6
    wide = rows["full"]["target"]
    assert wide["high"] - wide["low"] > 1e-3
    assert [r["test"]["others"] for r in study["rates"]] == [2.0, 2.0]
    assert (tmp_path / "plots/frontier.png").exists() and (tmp_path / "plots/overlap.png").exists()
    table = (tmp_path / "table.md").read_text()
    assert "| random | 4 | 0.1 | 7 |" in table and "esft_token - random" in table


def test_gains_are_compared_where_as_much_was_forgotten():
    def rate(method, target, others):
        return {"method": method, "test": {"target": target, "others": others}}

    rates = [rate("a", 2.8, 3.02), rate("a", 2.6, 3.22), rate("b", 2.9, 2.99), rate("b", 2.5, 3.05)]
    a, b = report.at_equal_forgetting(rates, {"target": 3.0, "others": 3.0})
    assert report.FORGOTTEN == (0.01, 0.03, 0.1, 0.2, 0.5)
    assert a["gains"] == [pytest.approx(g) for g in (0.1, 0.21, 0.28, 0.38)] + [None]
    # The first rate forgot nothing: between it and the next.
    assert b["gains"][:2] == [pytest.approx(0.1 + 0.4 * 2 / 6), pytest.approx(0.1 + 0.4 * 4 / 6)]
    assert b["gains"][2:] == [None, None, None]


def test_the_interval_of_a_mean_of_means_is_that_of_drawing_again():
    rng = np.random.default_rng(0)
    groups = [rng.normal(1.0, 0.5, 64), rng.normal(3.0, 0.1, 40)]
    found = report.mean_of_means(groups)
    drawn = [np.mean([rng.choice(g, len(g)).mean() for g in groups]) for _ in range(4000)]
    bounds = np.quantile(drawn, (0.025, 0.975))
    np.testing.assert_allclose([found.low, found.high], bounds, atol=5e-3)
