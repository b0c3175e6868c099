import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.core import tree

NAMES = st.text("abcxyz_0123", min_size=1, max_size=4)
TREES = st.recursive(
    st.integers(0, 9).map(lambda n: np.full((n % 3 + 1,), n, np.float32)),
    lambda children: st.dictionaries(NAMES, children, min_size=1, max_size=4),
    max_leaves=12,
).filter(lambda t: isinstance(t, dict))


@given(TREES)
def test_unflatten_is_the_inverse_of_flatten(t):
    assert tree.diff(tree.unflatten(tree.flatten(t)), t) == []


@given(TREES, st.lists(st.sampled_from(["**", "a/*", "**/x", "*", "b*/**"]), max_size=2))
def test_join_is_the_inverse_of_split(t, patterns):
    taken, rest = tree.split(t, patterns)
    assert tree.diff(tree.join(taken, rest), t) == []
    mask = tree.flatten(tree.mask(t, patterns))
    assert set(tree.flatten(taken)) == {path for path, on in mask.items() if on}


@pytest.mark.parametrize(
    "path,pattern,expected",
    [
        ("layers/0/attn/w_q", "layers/*/attn/*", True),
        ("layers/0/attn/w_q", "**/w_q", True),
        ("layers/0/attn/w_q", "layers/**", True),
        ("layers/0/attn/w_q", "layers/*", False),
        ("layers/0/attn/w_q", "layers/0/attn/w_q", True),
        ("layers/0/attn/w_qq", "layers/0/attn/w_q", False),
        ("w_q", "**/w_q", True),
        ("a.b", "a?b", False),
        ("a/b", "a*b", False),
    ],
)
def test_matches(path, pattern, expected):
    assert tree.matches(path, pattern) is expected


def test_stack_and_unstack_are_inverse():
    trees = [
        {"a": jnp.full((2,), i), "b": {"c": jnp.ones((1, i + 1))[:, :1] * i}} for i in range(3)
    ]
    back = tree.unstack(tree.stack(trees))
    assert [tree.diff(x, y) for x, y in zip(trees, back, strict=True)] == [[], [], []]


def test_lerp_gives_the_ends_bit_for_bit_and_the_middle_between():
    a = {"w": jnp.asarray([1.0, -0.0, 3e38], jnp.bfloat16)}
    b = {"w": jnp.asarray([2.0, 5.0, -3e38], jnp.bfloat16)}
    assert tree.diff(tree.lerp(a, b, 0), a) == []
    assert tree.diff(tree.lerp(a, b, 1.0), b) == []
    np.testing.assert_allclose(tree.lerp(a, b, 0.5)["w"].astype(jnp.float32), [1.5, 2.5, 0.0])


def test_join_refuses_a_path_in_both():
    with pytest.raises(ValueError, match="a/b"):
        tree.join({"a": {"b": np.ones(1)}}, {"a": {"b": np.ones(1)}})


def test_diff_names_paths_shapes_and_values():
    a = {"x": np.ones(2), "y": np.ones(3), "z": np.ones(1)}
    b = {"x": np.ones(2) * 2, "y": np.ones(4), "w": np.ones(1)}
    messages = "\n".join(tree.diff(a, b))
    assert "x: values differ by up to 1" in messages
    assert "y: float64[3] against float64[4]" in messages
    assert "w: only in the second" in messages and "z: only in the first" in messages


def test_sizes_of_abstract_trees():
    shape = jax.ShapeDtypeStruct
    t = {"a": shape((3, 5), jnp.bfloat16), "b": shape((), jnp.float32)}
    assert tree.num_params(t) == 16 and tree.num_bytes(t) == 34
