"""A folder appears whole or not at all, whatever stops the writer."""

import errno
import json
import os
import shutil
from collections import namedtuple

import pytest

from moejax.core.errors import InputError
from moejax.io import atomic

Usage = namedtuple("Usage", "total used free")


def make(target, overwrite=False, stop=None, text="new"):
    with atomic.atomic_dir(target, overwrite) as folder:
        (folder / "config.json").write_text(text)
        if stop is not None:
            raise stop


def test_a_folder_appears_with_its_parents(tmp_path):
    make(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "config.json").read_text() == "new"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    "stop,expected",
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("bug"), RuntimeError),
        (OSError(errno.ENOSPC, "full"), InputError),
        (OSError(errno.EDQUOT, "quota"), InputError),
        (ValueError(f"tensorstore: {os.strerror(errno.ENOSPC)} [OS error 28]"), InputError),
        (ValueError("a bug of ours"), ValueError),
    ],
)
def test_a_stop_leaves_no_trace(tmp_path, stop, expected):
    with pytest.raises(expected) as raised:
        make(tmp_path / "a" / "b", stop=stop)
    assert list(tmp_path.iterdir()) == []
    if expected is InputError:
        assert "no space left while writing" in str(raised.value)
    else:
        assert raised.value is stop


def test_a_stop_leaves_the_old_folder(tmp_path):
    make(tmp_path / "a", text="old")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a", overwrite=True, stop=KeyboardInterrupt())
    assert (tmp_path / "a" / "config.json").read_text() == "old"
    make(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "config.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    make(tmp_path / "a", text="old")
    rename, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:  # the new folder's, after the old one has moved aside
            raise OSError(errno.EIO, "disk")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk"):
        make(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "config.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "a").mkdir()
    make(tmp_path / "a")
    assert (tmp_path / "a" / "config.json").exists()


def test_what_is_there_is_left_alone(tmp_path):
    make(tmp_path / "model")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="exists: choose another or pass --overwrite"):
        make(tmp_path / "model")
    with pytest.raises(InputError, match="home is not a model folder: it will not be overwritten"):
        make(tmp_path / "home", overwrite=True)
    with pytest.raises(InputError, match="file is a file: name a folder"):
        make(tmp_path / "file", overwrite=True)
    with pytest.raises(InputError, match="file is a file: nothing can be written below"):
        make(tmp_path / "file" / "a")
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_room_is_asked_for_where_the_folder_will_be(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda p: asked.append(p) or Usage(0, 0, 2e9))
    atomic.require_disk(tmp_path / "not" / "yet", 2 * 10**9)
    with pytest.raises(InputError, match=r"needs 3.00 GB but 2.00 GB are free"):
        atomic.require_disk(tmp_path / "not" / "yet", 3 * 10**9)
    assert asked == [tmp_path, tmp_path]


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    atomic.write_json(path, {"ü": [1, 2.5, None]})
    assert json.loads(path.read_text()) == atomic.read_json(path) == {"ü": [1, 2.5, None]}
    with pytest.raises(TypeError):
        atomic.write_json(path, {"x": object()})
    assert atomic.read_json(path) == {"ü": [1, 2.5, None]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b'{"a": ', b"\xff\xfe", b""])
def test_broken_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json is not JSON"):
        atomic.read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"b\.json is missing"):
        atomic.read_json(tmp_path / "b.json")
