"""Training on a mesh is training on one device: every strategy, one or two processes."""

from __future__ import annotations

import numpy as np
import pytest

from moejax.core.precision import TOLERANCE
from tests.fake_devices import on_two_processes, results, start
from tests.train import sharded_cases

PROGRAM = "train/sharded_cases.py"


def check(found: list[dict], names: list[str]) -> None:
    assert [one["name"] for one in found] == names
    for one in found:
        assert max(one["losses"], one["params"]) <= TOLERANCE["float32"], found


def test_eight_devices_equal_one():
    check(results(start(PROGRAM, 8, "quick")), [case[0] for case in sharded_cases.QUICK])


@pytest.mark.slow
def test_every_strategy_and_mesh_shape_equals_one_device():
    check(results(start(PROGRAM, 8, "all")), [case[0] for case in sharded_cases.CASES])


@pytest.mark.slow
def test_two_processes_equal_one_device():
    first, second = on_two_processes(PROGRAM)
    assert [one["name"] for one in first] == [case[0] for case in sharded_cases.TWO]
    for one, other in zip(first, second, strict=True):
        assert one["found"] == other["found"]
        np.testing.assert_allclose(one["found"], one["wanted"], rtol=TOLERANCE["float32"])
