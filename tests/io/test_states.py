"""States on disk: what was computed comes back, an unfinished cache goes on, mistakes are named."""

from __future__ import annotations

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.io import states
from moejax.io.states import States, texts_hash, write_states

IDENTITY = {"model": "abc", "layers": [1, -1], "size": 3, "dtype": "bfloat16"}
LENGTHS = [(i * 7) % 5 for i in range(150)]  # some texts are empty


def computed(numbers):
    return [np.full((LENGTHS[n], 3), n, np.float32) for n in numbers]


def test_there_and_back_also_after_a_stop(tmp_path):
    calls = []

    def dies(numbers):
        calls.append(len(numbers))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return computed(numbers)

    with pytest.raises(KeyboardInterrupt):
        write_states(tmp_path, IDENTITY, LENGTHS, dies)
    with pytest.raises(InputError, match="lacks 2 of 3 parts"):
        States(tmp_path, IDENTITY, len(LENGTHS))
    done = []
    write_states(
        tmp_path,
        IDENTITY,
        LENGTHS,
        lambda n: calls.append(len(n)) or computed(n),
        lambda i, of: done.append((i, of)),
    )
    assert calls == [64, 64, 64, 22] and done[-1] == (150, 150)
    found = States(tmp_path, IDENTITY, len(LENGTHS))
    for number in (149, 0, 64, 63, 5):
        assert found[number].shape == (LENGTHS[number], 3)
        np.testing.assert_array_equal(found[number].astype(np.float32), computed([number])[0])


def test_what_is_not_what_was_asked_for(tmp_path):
    with pytest.raises(InputError, match="holds no states"):
        States(tmp_path, IDENTITY, 1)
    write_states(tmp_path, IDENTITY, LENGTHS[:3], computed)
    for change in ({"model": "other"}, {"layers": [2, -1]}, {"dtype": "float32"}):
        with pytest.raises(InputError, match=f"another {next(iter(change))}"):
            States(tmp_path, IDENTITY | change, 3)
        with pytest.raises(InputError, match="another"):
            write_states(tmp_path, IDENTITY | change, LENGTHS[:3], computed)
    shard = tmp_path / "shard_00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match="remove it, cache again"):
        States(tmp_path, IDENTITY, 3)[1]
    with pytest.raises(InputError, match="float8"):
        write_states(tmp_path / "b", IDENTITY | {"dtype": "float8"}, [1], computed)
    assert states.SHARD == 64
    assert texts_hash([[1, 2], [3]]) != texts_hash([[1], [2, 3]])
