"""A model's history is kept, hashed and never changed in place."""

import datetime
import json

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.io import lineage
from tests.tiny_llama import BASE, tensors_of, write_llama


def test_operations_follow_one_another(tmp_path):
    first = lineage.append((), "import", [{"path": "a", "xxh3": "0"}], {"dtype": "keep"})
    second = lineage.append(first, "merge", args={"lam": 0.75}, results={"params": 3})
    assert len(first) == 1 and [entry["op"] for entry in second] == ["import", "merge"]
    assert second[0] == first[0] and second[1]["inputs"] == []
    when = datetime.datetime.fromisoformat(second[1]["time"])
    assert abs(datetime.datetime.now(datetime.UTC) - when) < datetime.timedelta(minutes=1)
    lineage.write(tmp_path, second)
    assert lineage.read(tmp_path) == second
    assert isinstance(json.loads((tmp_path / "lineage.json").read_text()), list)


def test_a_folder_without_a_history_has_none(tmp_path):
    assert lineage.read(tmp_path) == ()


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"op": "import"}]'])
def test_a_history_that_is_none_is_named(tmp_path, content):
    (tmp_path / "lineage.json").write_text(content)
    with pytest.raises(InputError, match="is not a list of operations"):
        lineage.read(tmp_path)


def test_the_hash_of_a_folder_is_that_of_its_weights(tmp_path):
    one = write_llama(tmp_path / "one", BASE, tensors_of(BASE))
    two = write_llama(tmp_path / "two", BASE | {"rms_norm_eps": 1.0}, tensors_of(BASE))
    other = write_llama(tmp_path / "other", BASE, tensors_of(BASE, seed=1))
    assert lineage.hash_path(one) == lineage.hash_path(two) != lineage.hash_path(other)
    assert lineage.input_of(one) == {"path": str(one), "xxh3": lineage.hash_path(one)}
    with pytest.raises(InputError, match="no weight files"):
        lineage.hash_path(tmp_path)


def test_the_hash_of_a_tree_sees_every_bit():
    params = {"a": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.ones(2)}
    same = {"b": jnp.ones(2).astype(jnp.float32), "a": {"w": jnp.arange(6.0).reshape(2, 3)}}
    params["b"] = params["b"].astype(np.float32)
    seen = {lineage.hash_params(params)}
    assert seen == {lineage.hash_params(same)}
    for change in (
        {"a": {"w": params["a"]["w"].reshape(3, 2)}},
        {"a": {"v": params["a"]["w"]}},
        {"b": -params["b"]},
        {"b": params["b"].view(np.int32)},
    ):
        seen.add(lineage.hash_params(params | change))
    assert len(seen) == 5
