"""What `load_any` is given, and what it says when that is nothing it reads."""

import sys

import huggingface_hub
import pytest
from huggingface_hub import errors

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io.load import load_any, save_any
from tests.tiny_llama import BASE, tensors_of, write_llama


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    folder = write_llama(tmp_path / "cache", BASE, tensors_of(BASE))
    asked = []

    def fetch(name, **kwargs):
        asked.append(name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    loaded = load_any("org/name")
    assert asked == ["org/name"] and loaded.source == "org/name"
    assert loaded.lineage[0]["inputs"][0]["path"] == "org/name"
    assert tree.diff(loaded.params, load_any(folder).params) == []


@pytest.mark.parametrize(
    "error", [errors.LocalEntryNotFoundError("offline"), OSError("no route"), ValueError("name")]
)
def test_a_hub_id_that_cannot_be_fetched_is_one_line(monkeypatch, error):
    def fetch(name, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(InputError, match="org/name is no folder here and could not be fetched"):
        load_any("org/name")


def test_without_the_hub_library_a_hub_id_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        load_any("org/name")


def test_what_is_no_model(tmp_path):
    (tmp_path / "file.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "none", "none is missing: name a model folder"),
        (tmp_path / "file.txt", "is not a GGUF file"),
        (tmp_path / "empty", "it is no model folder"),
    ):
        with pytest.raises(InputError, match=message):
            load_any(source)


def test_names_that_are_none(tmp_path):
    folder = write_llama(tmp_path / "m", BASE, tensors_of(BASE))
    with pytest.raises(InputError, match="dtype 'int4' is unknown: use keep or one of float64"):
        load_any(folder, "int4")
    with pytest.raises(InputError, match="format 'pickle' is unknown: use one of hf, orbax"):
        save_any(load_any(folder), tmp_path / "out", "pickle")


def test_progress_is_told_in_bytes(tmp_path):
    folder = write_llama(tmp_path / "m", BASE, tensors_of(BASE))
    reading, writing = [], []
    loaded = load_any(folder, progress=lambda done, total: reading.append((done, total)))
    save_any(loaded, tmp_path / "o", progress=lambda done, total: writing.append((done, total)))
    size = tree.num_bytes(loaded.params)
    for seen in (reading, writing):
        assert seen == sorted(seen) and seen[-1] == (size, size) and len(seen) > 10
