"""Plain data as JSON: how arguments and results cross between processes that share no trust.

Also read by the sandbox's child, which has no packages: the standard library only.
"""

import math
from collections import deque
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from itertools import islice
from typing import Any

MAX_DEPTH, MAX_ITEMS = 20, 100_000
_CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}


def encode(value: Any, depth: int = 0) -> Any:
    """Returns JSON for None, bool, int, float, str, bytes and their lists, tuples, sets and dicts.

    Types are compared exactly: an instance of a subclass (whose ``__eq__`` could lie) is refused.

    Raises:
      ValueError: anything else, or nesting deeper than MAX_DEPTH.
    """
    kind = type(value)
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind in _CONTAINERS.values():
        return {kind.__name__: [encode(item, depth + 1) for item in value]}
    if kind is dict:
        pairs = [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]
        return {"dict": pairs}
    raise ValueError(f"not plain data: {kind.__name__}")


def encode_loosely(value: Any, depth: int = 0) -> Any:
    """`encode`, for values whose types are near enough: what they are compared by is what crosses.

    A Counter is sent as a dict, a named tuple as a tuple, an enum of ints as an int; also complex
    numbers, ranges, deques, and iterators as a list of what they give (at most MAX_ITEMS).

    Raises:
      ValueError: anything else, or nesting deeper than MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if value is None or type(value) in (bool, int, float, str):
        return value
    for simple in (bool, int, float, str, bytes):
        if isinstance(value, simple):
            return encode(simple(value), depth)  # type: ignore[arg-type]
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, dict):
        pairs = [(encode_loosely(k, depth + 1), v) for k, v in dict.items(value)]
        return {"dict": [[key, encode_loosely(v, depth + 1)] for key, v in pairs]}
    for name, kind in _CONTAINERS.items():
        if isinstance(value, kind):
            return {name: [encode_loosely(item, depth + 1) for item in value]}
    if isinstance(value, (KeysView, ItemsView)):
        return {"set": [encode_loosely(item, depth + 1) for item in value]}
    if isinstance(value, (Iterator, ValuesView)):
        items = [encode_loosely(item, depth + 1) for item in islice(iter(value), MAX_ITEMS)]
        return {"iterator": items}
    raise ValueError(f"not plain data: {type(value).__name__}")


def decode(data: Any, depth: int = 0) -> Any:
    """Returns the value that `encode` made `data` of, as a new object.

    Raises:
      ValueError: data that `encode` cannot have made.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if not (isinstance(data, dict) and len(data) == 1):
        raise ValueError("not encoded plain data")
    ((kind, items),) = data.items()
    if kind == "bytes" and isinstance(items, str):
        return bytes.fromhex(items)
    if not isinstance(items, list):
        raise ValueError("not encoded plain data")
    try:
        if kind == "dict":
            return {decode(k, depth + 1): decode(v, depth + 1) for k, v in items}
        if kind in ("complex", "range"):
            return complex(*items) if kind == "complex" else range(*items)
        if kind == "iterator":
            return iter([decode(item, depth + 1) for item in items])
        if kind in _CONTAINERS:
            return _CONTAINERS[kind](decode(item, depth + 1) for item in items)
    except TypeError as error:  # an unhashable key, a pair that is not one
        raise ValueError("not encoded plain data") from error
    raise ValueError(f"not encoded plain data: {kind}")


def equal(a: Any, b: Any) -> bool:
    """Whether two plain values are equal as ``==`` says, floats to 1e-9 relative or absolute."""
    if isinstance(a, float) or isinstance(b, float):
        numbers = (bool, int, float)
        if not (isinstance(a, numbers) and isinstance(b, numbers)):
            return False
        return a == b or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and type(a) is type(b):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return bool(a == b)
