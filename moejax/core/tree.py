"""Nested dicts of arrays, addressed by path: the one data structure that every method works on.

A path is the keys joined by ``/`` (``layers/0/attn/w_q``). A pattern is a path in which ``*``
stands for any text inside one key and ``**`` for any number of whole keys. Leaves may be arrays
or ``jax.ShapeDtypeStruct``; nothing here touches a device unless it is asked for arithmetic.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any  # dict[str, Tree | array]


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts to ``{path: leaf}``, in their order. Inverse: `unflatten`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, path + "/"))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Builds nested dicts out of ``{path: leaf}``. Inverse: `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def map_with_path(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Applies ``fn(path, leaf)`` to every leaf."""
    return unflatten({path: fn(path, leaf) for path, leaf in flatten(tree).items()})


@lru_cache(maxsize=4096)
def _compile(pattern: str) -> re.Pattern[str]:
    parts = []
    for key in pattern.split("/"):
        if key == "**":
            parts.append("(?:[^/]+/)*")
        else:
            parts.append(re.escape(key).replace(r"\*", "[^/]*") + "/")
    return re.compile("".join(parts))


def matches(path: str, pattern: str) -> bool:
    """Whether a path fits a pattern: ``*`` inside one key, ``**`` any number of keys."""
    return _compile(pattern).fullmatch(path + "/") is not None


def _as_patterns(patterns: str | Iterable[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def mask(tree: Tree, patterns: str | Iterable[str]) -> Tree:
    """A tree of bools: True where the leaf's path fits any of the patterns."""
    wanted = _as_patterns(patterns)
    return map_with_path(lambda path, _: any(matches(path, p) for p in wanted), tree)


def split(tree: Tree, patterns: str | Iterable[str]) -> tuple[Tree, Tree]:
    """Splits a tree into (leaves that fit, the rest). Inverse: `join`."""
    wanted = _as_patterns(patterns)
    taken: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for path, leaf in flatten(tree).items():
        (taken if any(matches(path, p) for p in wanted) else rest)[path] = leaf
    return unflatten(taken), unflatten(rest)


def join(first: Tree, second: Tree) -> Tree:
    """Joins two trees with no path in common. Inverse: `split`."""
    left, right = flatten(first), flatten(second)
    both = left.keys() & right.keys()
    if both:
        raise ValueError(f"both trees hold {min(both)}: join takes trees with no path in common")
    return unflatten(left | right)


def lerp(a: Tree, b: Tree, t: float | jax.Array) -> Tree:
    """``(1 - t) * a + t * b`` leaf by leaf in float32, cast back; 0 and 1 give the ends' bits."""
    if isinstance(t, (int, float)) and t in (0, 1):
        return b if t else a

    def leaf(x, y):
        mixed = (1 - t) * x.astype(jnp.float32) + t * y.astype(jnp.float32)
        return mixed.astype(x.dtype)

    return jax.tree.map(leaf, a, b)


def stack(trees: list[Tree]) -> Tree:
    """Stacks equal trees on a new leading dim. Inverse: `unstack`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Tree) -> list[Tree]:
    """Cuts the leading dim of every leaf: ``[n, ...]`` becomes n trees. Inverse: `stack`."""
    num = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(num)]


def diff(a: Tree, b: Tree) -> list[str]:
    """Says where two trees differ in paths, shapes, dtypes or bits; empty when nowhere."""
    left, right = flatten(a), flatten(b)
    found = [f"{path}: only in the first" for path in left.keys() - right.keys()]
    found += [f"{path}: only in the second" for path in right.keys() - left.keys()]
    for path in left.keys() & right.keys():
        x, y = left[path], right[path]
        if x.shape != y.shape or x.dtype != y.dtype:
            found.append(f"{path}: {x.dtype}{list(x.shape)} against {y.dtype}{list(y.shape)}")
        elif not isinstance(x, jax.ShapeDtypeStruct):
            x, y = np.asarray(x), np.asarray(y)
            if x.tobytes() != y.tobytes():
                gap = np.max(np.abs(x.astype(np.float64) - y.astype(np.float64)))
                found.append(f"{path}: values differ by up to {gap:.3g}")
    return sorted(found)


def num_params(tree: Tree) -> int:
    """Number of scalars in a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Tree) -> int:
    """Bytes that a tree's arrays take."""
    return sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )


def abstract(tree: Tree) -> Tree:
    """The same tree with shapes and dtypes in place of arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
