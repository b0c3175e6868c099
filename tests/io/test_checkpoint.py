"""Checkpoints: what is saved comes back bit for bit, what is broken never passes for whole."""

import errno
import logging
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic, orbax
from moejax.io.checkpoint import Checkpoints


def state(seed: int = 0) -> tree.Tree:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "step": jnp.int32(seed),
        "params": {"w": jax.random.normal(keys[0], (3, 5))},
        "opt_state": {"0": {"mu": jax.random.normal(keys[1], (7,)).astype(jnp.bfloat16)}},
    }


WANTED = tree.abstract(state())


def damage(checkpoints: Checkpoints, step: int) -> None:
    """Flips one byte of the largest file of a step."""
    files = [f for f in checkpoints._folder(step).rglob("*") if f.is_file()]
    file = max(files, key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_restore_is_the_inverse_of_save(tmp_path):
    checkpoints = Checkpoints(tmp_path / "ckpt")
    checkpoints.save(3, state(3), {"nll": 1.5})
    restored = Checkpoints(tmp_path / "ckpt").restore(None, WANTED)
    assert tree.diff(restored, state(3)) == []
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert checkpoints.metrics(3) == {"nll": 1.5}


def test_numpy_arrays_are_saved_too(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, jax.tree.map(np.asarray, state()))
    assert tree.diff(checkpoints.restore(0, WANTED), state()) == []


def test_every_save_is_kept_to_the_last_n_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, best_metric="nll")
    for step, nll in enumerate([3.0, 1.0, float("nan"), 2.5, 2.0]):
        checkpoints.save(step, state(step), {"nll": nll})
    assert checkpoints.steps() == [1, 3, 4]
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (4, 1)
    assert tree.diff(checkpoints.restore(1, WANTED), state(1)) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_{s:08d}" for s in (1, 3, 4)]


def test_saves_in_quick_succession_are_all_kept_and_may_donate(tmp_path):
    """Orbax's own Checkpointer skips a save while another is under way."""
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    negate = jax.jit(lambda tree: jax.tree.map(lambda x: -x, tree), donate_argnums=0)
    value = {"w": jnp.ones((64, 1024))}
    for step in range(5):
        checkpoints.start(step, value)
        value = negate(value)
    checkpoints.wait()
    assert checkpoints.steps() == [0, 1, 2, 3, 4]
    for step in range(5):
        found = checkpoints.restore(step, tree.abstract(value))["w"]
        assert np.unique(found).tolist() == [(-1.0) ** step]


def test_every_nth_step_is_kept_for_averaging(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_every=3)
    for step in range(1, 9):
        checkpoints.save(step, state(step))
    assert checkpoints.steps() == [3, 6, 8]
    with pytest.raises(InputError, match="keep_every must be 0 or more, got -1"):
        Checkpoints(tmp_path, keep_every=-1)


def test_weights_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))
    wanted = {"params": WANTED["params"]}
    found = checkpoints.restore(None, wanted, partial=True)
    assert tree.diff(found, {"params": state(1)["params"]}) == []
    with pytest.raises(InputError, match="lacks params/v"):
        checkpoints.restore(None, {"params": {"v": WANTED["step"]}}, partial=True)


def test_an_error_of_the_background_is_raised_by_what_waits(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))
    full = OSError(errno.ENOSPC, "full")
    monkeypatch.setattr(atomic, "sync_files", lambda path: (_ for _ in ()).throw(full))
    checkpoints.start(2, state(2))
    with pytest.raises(InputError, match="no space left while writing .*step_00000002"):
        checkpoints.start(3, state(3))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_an_older_step_saved_again_ends_what_followed_it(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    checkpoints.save(2, state(20))
    assert checkpoints.steps() == [1, 2]
    assert tree.diff(checkpoints.restore(2, WANTED), state(20)) == []


def test_a_broken_newest_falls_back_loudly(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    damage(checkpoints, 2)
    again = Checkpoints(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert again.latest_step() == 1
    assert "step_00000002 is broken: going back" in caplog.text
    assert tree.diff(again.restore(None, WANTED), state(1)) == []
    with pytest.raises(InputError, match="step_00000002 is broken: choose another step"):
        again.restore(2, WANTED)


def test_when_all_are_broken_nothing_starts_anew_by_itself(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state())
    damage(checkpoints, 1)
    with pytest.raises(InputError, match="all 1 checkpoints .* are broken: remove"):
        Checkpoints(tmp_path).latest_step()


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_save_cut_off_leaves_the_one_before(tmp_path, monkeypatch, stop):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))

    def cut_off(path, value):
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_json", cut_off)
        expected = InputError if isinstance(stop, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            checkpoints.save(2, state(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert tree.diff(Checkpoints(tmp_path).restore(None, WANTED), state(1)) == []


def test_ctrl_c_waits_for_the_threads_that_write(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))
    finish, finished = checkpoints._finish, []

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        finish(*args)
        finished.append(True)

    monkeypatch.setattr(checkpoints, "_finish", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, state(2))
    assert finished == [True] and signal.getsignal(signal.SIGINT) is handler
    assert Checkpoints(tmp_path).latest_step() == 2


def test_a_killed_save_is_no_checkpoint_and_the_next_one_clears_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    orbax.save_tree(tmp_path / ".part" / "state", state())
    assert checkpoints.latest_step() is None
    checkpoints.save(1, state(1))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize(
    "wanted,message",
    [
        ({**WANTED, "more": WANTED["step"]}, "lacks more"),
        ({k: v for k, v in WANTED.items() if k != "step"}, "also holds step"),
        (
            {
                **WANTED,
                "params": {**WANTED["params"], "w": jax.ShapeDtypeStruct((4, 5), "float32")},
            },
            r"params/w has shape \[3, 5\], the config asks for \[4, 5\]",
        ),
    ],
)
def test_a_tree_of_another_config_is_named(tmp_path, wanted, message):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state())
    with pytest.raises(InputError, match=message):
        checkpoints.restore(None, wanted)


def test_what_is_not_there(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.steps() == [] and checkpoints.latest_step() is None
    assert checkpoints.best_step() is None
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoints.restore(None, WANTED)
    with pytest.raises(InputError, match="no checkpoint of step 4: it has none"):
        checkpoints.restore(4, WANTED)
    with pytest.raises(InputError, match="keep_last must be at least 1, got 0"):
        Checkpoints(tmp_path, keep_last=0)
