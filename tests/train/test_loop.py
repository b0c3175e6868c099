"""A run resumes bit for bit, stops cleanly, keeps its best, never joins another run's folder."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.core.mesh import make_mesh
from moejax.train import loop
from moejax.train.log import read_metrics
from moejax.train.loop import RunInfo, TrainConfig, fit, load_best, load_params
from moejax.train.optim import OptimConfig

REPO = Path(__file__).parents[2]
QUIET = RunInfo(quiet=True)
CONFIG = TrainConfig(
    steps=6, optim=OptimConfig(lr=1e-2, warmup_steps=1), accumulation=2, save_every=2
)
# What a record holds that a clock decides.
CLOCK = ("step_s", "tokens_per_s", "gflops", "mfu")


def loss_fn(trainable, frozen, batch, rng):
    """A regression with noise from the rng, so that a resumed run must draw the same."""
    noise = 0.1 * jax.random.normal(rng, batch["y"].shape)
    out = jnp.tanh(batch["x"] @ trainable["w"]) @ trainable["v"] + frozen["b"]
    loss = jnp.mean((out + noise - batch["y"]) ** 2)
    return loss, {"target_count": len(batch["y"]), "token_count": len(batch["y"])}


def batches(step: int):
    rng = np.random.default_rng(step)
    x, y = rng.normal(size=(8, 4)), rng.normal(size=8)
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


def start():
    rng = np.random.default_rng(99)
    trainable = {"w": rng.normal(size=(4, 5)), "v": rng.normal(size=5)}
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), trainable), {"b": jnp.float32(0.1)}


def run(workdir, config=CONFIG, batches=batches, **kwargs):
    return fit(config, loss_fn, *start(), batches, workdir, **{"info": QUIET, **kwargs})


def without_clock(records):
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in records]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("killed_after", [1, 2, 3, 5])
def test_killed_and_resumed_is_never_killed(tmp_path, never_killed, killed_after):
    class KilledError(Exception):
        pass

    def dying(step):
        if step == killed_after:
            raise KilledError
        return batches(step)

    with pytest.raises(KilledError):
        run(tmp_path, batches=dying)
    assert len(read_metrics(tmp_path)) == killed_after
    resumed = run(tmp_path)
    assert tree.diff(resumed.params, never_killed.params) == []
    assert without_clock(resumed.records) == without_clock(never_killed.records)
    assert [r["step"] for r in resumed.records] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_read_back_and_not_run_again(tmp_path, never_killed):
    run(tmp_path)

    def untouched(step):
        raise AssertionError("a finished run asked for data")

    again = run(tmp_path, batches=untouched)
    assert tree.diff(again.params, never_killed.params) == []
    assert again.step == 6 and len(again.records) == 6


def test_the_callers_parameters_stay_unless_donated(tmp_path):
    trainable, frozen = start()
    before = jax.tree.map(np.array, trainable)
    fit(CONFIG, loss_fn, trainable, frozen, batches, tmp_path / "kept", info=QUIET)
    assert tree.diff(trainable, before) == []
    info = RunInfo(quiet=True, donate=True)
    for _ in range(2):  # the second start reads a checkpoint
        trainable, frozen = start()
        fit(CONFIG, loss_fn, trainable, frozen, batches, tmp_path / "given", info=info)
        assert trainable["w"].is_deleted() and not frozen["b"].is_deleted()


def test_training_lowers_the_loss(tmp_path):
    config = TrainConfig(steps=40, optim=OptimConfig(name="adamw", lr=3e-2))
    records = run(tmp_path, config, batches=lambda step: batches(0)).records
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 3}, r"train\.seed \(0 there, 3 here\)"),
        ({"steps": 7}, r"train\.steps \(6 there, 7 here\)"),
        ({"optim": OptimConfig(lr=1e-3)}, r"train\.optim\.lr .* train\.optim\.warmup_steps"),
    ],
)
def test_a_directory_of_another_config_is_refused(tmp_path, change, named):
    run(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=named) as caught:
        run(tmp_path, dataclasses.replace(CONFIG, **change))
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_directory_of_another_model_is_refused(tmp_path):
    run(tmp_path, info=RunInfo(quiet=True, identity={"model": {"d_model": 8}}))
    with pytest.raises(InputError, match=r"model\.d_model \(8 there, 9 here\)"):
        run(tmp_path, info=RunInfo(quiet=True, identity={"model": {"d_model": 9}}))


class Stream:
    """Batches that know where they stand."""

    def __init__(self):
        self.resumed = None

    def __call__(self, step):
        return batches(step)

    def state(self, step):
        return {"next_row": 8 * step}

    def resume(self, step, state):
        self.resumed = step, state


def test_a_checkpoint_has_where_the_data_stood(tmp_path):
    first, second, third = Stream(), Stream(), Stream()
    run(tmp_path, batches=first)
    done = tmp_path / "ckpt" / "step_00000006" / "done.json"
    found = json.loads(done.read_text())
    assert first.resumed is None and found["data"] == {"next_row": 48}
    run(tmp_path, batches=second)
    assert second.resumed == (6, {"next_row": 48})
    del found["data"]  # as in a checkpoint of an earlier version: the step says where it stood
    done.write_text(json.dumps(found))
    assert run(tmp_path, batches=third).step == 6 and third.resumed is None


def test_a_directory_made_before_a_key_was_there_means_what_it_meant(tmp_path):
    run(tmp_path, info=RunInfo(quiet=True, identity={"data": {"sha256": "1"}}))

    def again(on_long):
        identity = {"data": {"on_long": on_long, "rows_sha256": "2"}}
        before = {"data.on_long": "truncate", "data.rows_sha256": None, "data.sha256": None}
        return run(tmp_path, info=RunInfo(quiet=True, identity=identity, before=before))

    with pytest.raises(InputError, match=r"data\.on_long \('truncate' there, 'split' here\)\. The"):
        again("split")
    assert again("truncate").step == 6
    with pytest.raises(InputError, match="on_long"):
        again("drop")


def test_how_often_to_log_and_save_may_change(tmp_path, never_killed):
    run(tmp_path)
    other = dataclasses.replace(CONFIG, log_every=3, save_every=1, keep_last=2)
    assert run(tmp_path, other).step == 6


def test_on_policy_batches_on_a_mesh_are_refused_before_anything_is_written(tmp_path):
    info = RunInfo(quiet=True, on_policy=True, mesh=make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(InputError, match="made on one device, and this run has a mesh of 1"):
        run(tmp_path / "run", info=info)
    assert not (tmp_path / "run").exists()


def test_one_step_at_most_is_in_flight_however_seldom_losses_are_fetched(tmp_path, monkeypatch):
    ended: list[None] = []
    begun: list[int] = []

    class Loss:
        def block_until_ready(self):
            ended.append(None)

        def __array__(self, *_, **__):
            return np.float32(1)

    def update(state, frozen, batch, key):
        begun.append(len(ended))
        return state, {"loss": Loss(), "grad_norm": np.float32(1)}

    monkeypatch.setattr(loop, "make_train_step", lambda *_: update)
    run(tmp_path, dataclasses.replace(CONFIG, log_every=100, save_every=0))
    assert begun == [0, 0, 1, 2, 3, 4]  # how many have ended when each begins


def test_rows_that_accumulation_does_not_divide(tmp_path):
    with pytest.raises(InputError, match="8 rows .* accumulation=3"):
        run(tmp_path, dataclasses.replace(CONFIG, accumulation=3))


def test_a_loss_that_is_not_finite_stops_and_is_not_saved(tmp_path):
    def poisoned(step):
        batch = batches(step)
        return batch | {"y": batch["y"] * np.nan} if step == 3 else batch

    with pytest.raises(InputError, match="loss is nan .* at step 4 .* checkpoint is step 2"):
        run(tmp_path, batches=poisoned)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]


def test_the_best_evaluation_is_kept_across_a_kill(tmp_path):
    """Evaluations 5, 2, 7, ... : the weights of step 2 are kept, also when killed at step 3."""
    values = {1: 5.0, 2: 2.0, 3: 7.0, 4: 3.0, 5: 4.0, 6: 6.0}
    config = dataclasses.replace(CONFIG, eval_every=1, best_metric="nll")
    seen = {}

    def evaluate(trainable, frozen):
        step = len(seen) % 6 + 1
        seen[step] = jax.tree.map(np.array, trainable)
        return {"nll": values[step]}

    def dying(step):
        if step == 4:
            raise RuntimeError
        return batches(step)

    with pytest.raises(RuntimeError):
        run(tmp_path, config, batches=dying, eval_fn=evaluate)
    result = run(tmp_path, config, eval_fn=evaluate)
    assert (result.best_step, result.best_value) == (2, 2.0)
    assert tree.diff(load_best(tmp_path, result.params), seen[2]) == []
    evals = [r["eval/nll"] for r in result.records if "eval/nll" in r]
    assert evals == list(values.values())


def weight(trainable, frozen):
    return {"nll": float(jnp.abs(trainable["w"]).sum())}


@pytest.mark.parametrize("fails_at", [3, 6])
def test_an_evaluation_that_fails_costs_no_step_and_is_made_up_for(tmp_path, fails_at):
    config = dataclasses.replace(CONFIG, save_every=3, eval_every=3, best_metric="nll")
    whole = run(tmp_path / "whole", config, eval_fn=weight)
    asked, evaluated = [], []

    def failing(trainable, frozen):
        evaluated.append(None)
        if len(evaluated) == fails_at // 3:
            raise MemoryError
        return weight(trainable, frozen)

    def counted(step):
        asked.append(step)
        return batches(step)

    with pytest.raises(MemoryError):
        run(tmp_path / "run", config, eval_fn=failing)
    again = run(tmp_path / "run", config, batches=counted, eval_fn=weight)
    assert sorted(set(asked)) == list(range(fails_at, 6))
    assert without_clock(again.records) == without_clock(whole.records)
    assert (again.best_step, again.best_value) == (whole.best_step, whole.best_value)
    assert "eval/nll" in whole.records[-1] and whole.last_loss == whole.records[-2]["loss"]
    best = [load_best(tmp_path / name, again.params) for name in ("run", "whole")]
    assert tree.diff(*best) == []


def test_a_run_that_is_told_to_stop_saves_and_leaves_the_evaluation_to_the_next_start(tmp_path):
    config = dataclasses.replace(CONFIG, save_every=0, eval_every=3)

    def stopped(step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return batches(step)

    with pytest.raises(KeyboardInterrupt, match="step 3 of 6 is saved"):
        run(tmp_path / "run", config, batches=stopped, eval_fn=weight)
    assert not any("eval/nll" in record for record in read_metrics(tmp_path / "run"))
    again = run(tmp_path / "run", config, eval_fn=weight)
    whole = run(tmp_path / "whole", config, eval_fn=weight)
    assert without_clock(again.records) == without_clock(whole.records)


def test_an_unknown_best_metric_is_named(tmp_path):
    config = dataclasses.replace(CONFIG, best_metric="accuracy")
    with pytest.raises(InputError, match="'accuracy' .* use nll"):
        run(tmp_path, config, eval_fn=lambda trainable, frozen: {"nll": 1.0})


def test_the_run_directory_says_what_was_run(tmp_path):
    run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["train"]["optim"]["lr"] == 1e-2
    env = json.loads((tmp_path / "env.json").read_text())
    assert env["versions"]["jax"] == jax.__version__
    record = read_metrics(tmp_path)[0]
    assert {"step", "loss", "lr", "grad_norm", "step_s", "tokens_per_s"} <= record.keys()
    assert record["lr"] == 0.0  # step 0 of a warm-up
    assert list((tmp_path / "tb").iterdir())


CHILD = """
import signal, sys, time
from tests.train import test_loop
from moejax.train.loop import RunInfo

def slow(step):
    print(f"at {step}", flush=True)
    time.sleep(0.2 if step < 4 else 20)
    return test_loop.batches(step)

try:
    test_loop.run(sys.argv[1], batches=slow)
except KeyboardInterrupt as stop:
    print(stop)
    sys.exit(130)
"""


def start_child(workdir) -> subprocess.Popen:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", CHILD, str(workdir)]
    return subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.PIPE, text=True)


def wait_for_line(child: subprocess.Popen, text: str) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(text):
            return
    raise AssertionError(f"the child ended without printing {text!r}")


def test_a_process_killed_by_sigkill_resumes_bit_for_bit(tmp_path, never_killed):
    child = start_child(tmp_path)
    wait_for_line(child, "at 3")
    child.kill()
    child.wait()
    resumed = run(tmp_path)
    assert tree.diff(resumed.params, never_killed.params) == []
    assert without_clock(resumed.records) == without_clock(never_killed.records)


def test_ctrl_c_saves_says_so_and_exits_130(tmp_path, never_killed):
    child = start_child(tmp_path)
    wait_for_line(child, "at 2")
    time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted: step 3 of 6 is saved" in out
    assert tree.diff(run(tmp_path).params, never_killed.params) == []


def test_steps_that_are_not_finite_are_skipped_counted_and_not_without_end(tmp_path):
    def poisoned(step):
        batch = batches(step)
        return batch | {"y": batch["y"] * np.nan} if step in (2, 4, 5) else batch

    config = dataclasses.replace(CONFIG, steps=8, max_skipped=2)
    result = run(tmp_path / "some", config, batches=poisoned)
    assert result.step == 8 and result.skipped_steps == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))
    with pytest.raises(InputError, match="at step 6 and 1 before it"):
        run(tmp_path / "many", dataclasses.replace(config, max_skipped=1), batches=poisoned)


def test_weights_alone_of_any_kept_step(tmp_path):
    config = dataclasses.replace(CONFIG, save_every=1, keep_every=3)
    result = run(tmp_path, config)
    assert tree.diff(load_params(tmp_path, result.params), result.params) == []
    assert tree.diff(load_params(tmp_path, result.params, 3), result.params) != []
