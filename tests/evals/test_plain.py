"""Plain data crosses unchanged; anything else does not cross."""

import collections
import enum
import json
import math

import pytest

from moejax.evals import plain

VALUES = [
    None, True, 0, -3, 10**300, 1.5, "", "é\ud800\n", b"\x00\xff", [], [1, [2]], (1, (2,), []),
    {1, 2}, frozenset({"a"}), {}, {"a": {1: None}, (1, 2): [b""]}, float("inf"),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_decode_undoes_encode(value):
    again = plain.decode(json.loads(json.dumps(plain.encode(value))))
    assert again == value and type(again) is type(value)
    assert plain.equal(again, value)


class Lying(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    "value",
    [
        Lying(1),
        [Lying(1)],
        {Lying(1): 2},
        object(),
        collections.OrderedDict(),
        collections.namedtuple("Point", "x")(1),
        enum.IntEnum("Level", "LOW").LOW,
        1j,
        range(3),
        int,
        (x for x in ()),
        bytearray(b"x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused(value):
    with pytest.raises(ValueError, match="not plain data"):
        plain.encode(value)


def test_what_contains_itself_is_refused():
    value: list = []
    value.append(value)
    with pytest.raises(ValueError, match="nested deeper"):
        plain.encode(value)


@pytest.mark.parametrize(
    "data",
    [[1], {"list": 1}, {"list": [], "set": []}, {}, {"bytes": "xyz"}, {"dict": [1]},
     {"eval": ["1"]}, {"dict": [[{"list": []}, 1]]}, {"set": [{"list": []}]}],
)  # fmt: skip
def test_forged_data_is_refused(data):
    with pytest.raises(ValueError):
        plain.decode(data)


def test_equality_is_pythons_with_room_for_rounding():
    assert plain.equal(0.1 + 0.2, 0.3) and plain.equal([1, {"a": 0.1 + 0.2}], [1, {"a": 0.3}])
    assert plain.equal(1, 1.0) and plain.equal(True, 1)
    for a, b in [(1, 2), ([1], (1,)), ("1", 1), ([1], [1, 2]), ({"a": 1}, {"b": 1}), (1.0, "1"),
                 (0.1, 0.2), ([], None), (math.nan, math.nan), ({1}, [1])]:  # fmt: skip
        assert not plain.equal(a, b) and not plain.equal(b, a)
