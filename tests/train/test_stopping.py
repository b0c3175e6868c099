"""What stops a run from outside, what watches it, and how its batches come."""

from __future__ import annotations

import signal
import time

import jax
import numpy as np
import pytest

from launch import cli
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.train.feed import Feed
from moejax.train.stopping import Agreement, Preempted, Watchdog, stop_on_signal


def test_a_step_that_hangs_has_all_stacks_dumped(tmp_path, capfd):
    stacks = tmp_path / "stacks" / "process_0.txt"
    with Watchdog(0.2, stacks) as watchdog:
        watchdog.beat(3)
        time.sleep(0.7)
    assert "test_a_step_that_hangs_has_all_stacks_dumped" in stacks.read_text()
    assert "nothing after step 3 for 0.2 s" in capfd.readouterr().err


def test_a_run_that_goes_on_leaves_no_stacks(tmp_path):
    with Watchdog(30, tmp_path / "stacks.txt") as watchdog:
        watchdog.beat(1)
    with Watchdog(0, tmp_path / "none" / "stacks.txt") as watchdog:
        watchdog.beat(1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number, error", [("SIGTERM", Preempted), ("SIGINT", KeyboardInterrupt)])
def test_the_first_signal_asks_and_is_told_apart(number, error):
    before, said = signal.getsignal(signal.SIGTERM), []
    with stop_on_signal(said.append) as stop:
        assert stop.error is None and Agreement(None).reached(stop.error) is None
        signal.raise_signal(signal.Signals[number])
        assert stop.error is error and Agreement(None).reached(stop.error) is error
    assert len(said) == 1 and signal.getsignal(signal.SIGTERM) is before
    assert Preempted.exit_code == cli.EXIT_PREEMPTED == 75


def test_what_one_process_was_asked_all_stop_with_a_step_later(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    agreement = Agreement(make_mesh(devices=jax.devices()[:1]))
    asked = [None, KeyboardInterrupt, Preempted, None]
    told = [None, None, KeyboardInterrupt, Preempted]
    assert [agreement.reached(error) for error in asked] == told


def test_batches_are_made_ahead_in_order_and_errors_come_with_their_step():
    asked = []

    def batches(step):
        asked.append(step)
        if step == 3:
            raise InputError("row 3 is broken")
        return {"x": np.full(2, step)}

    with Feed(batches, 5, None, ahead=2) as feed:
        assert [feed.get(step)["x"][0] for step in (0, 1, 2)] == [0, 1, 2]
        with pytest.raises(InputError, match="row 3 is broken"):
            feed.get(3)
    assert asked[:4] == [0, 1, 2, 3]
    with pytest.raises(InputError, match="2 rows .* accumulation=3"):
        Feed(batches, 5, None, 0).check(0, 3)
