"""The verdict's words, and reports that do not fit."""

from __future__ import annotations

import copy

import pytest

from moejax import report
from tests.report.fake_report import fake_report


@pytest.mark.parametrize(
    "metric,bounds,verdict",
    [
        ("nll", (-0.2, -0.3, -0.1), "better"),
        ("nll", (0.2, 0.1, 0.3), "worse"),
        ("nll", (-0.2, -0.5, 0.1), "no gain"),
        ("nll", (-0.2, -0.5, 0.0), "no gain"),  # an interval that touches 0 covers it
        ("nll", (0.0, 0.0, 0.0), "no gain"),
        ("pass_at_1", (0.2, 0.1, 0.3), "better"),
        ("pass_at_1", (-0.2, -0.3, -0.1), "worse"),
        ("pass_at_1", (0.1, -0.1, 0.3), "no gain"),
    ],
)
def test_verdict(metric, bounds, verdict):
    assert report.difference(metric, *bounds)["verdict"] == verdict


def test_a_mean_outside_its_interval_is_refused():
    with pytest.raises(ValueError, match="outside its interval"):
        report.difference("nll", 1.0, 2.0, 3.0)


def test_a_whole_report_passes():
    report.check(fake_report())


def _broken(change) -> dict:
    broken = copy.deepcopy(fake_report())
    change(broken)
    return broken


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda r: r.pop("differences"), "no 'differences'"),
        (lambda r: r["rows"][2].pop("wall_s"), "row 'moe' has no wall_s"),
        (lambda r: r["rows"][1].update(nll_tokens=7), "different tokens"),
        (lambda r: r["rows"][1].update(model="base"), "two rows"),
        (lambda r: r["rows"][1].update(nll=9.0), "nll 9.0 outside"),
        (lambda r: r["differences"][0].update(minus="nobody"), "'nobody'"),
        (lambda r: r["differences"][1]["nll"].update(verdict="better"), "verdict is wrong"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        report.check(_broken(change))
