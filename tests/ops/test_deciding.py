"""Lists that a step makes of its rows' own scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.deciding import best_of_rows

UNITS = 9


@pytest.mark.parametrize(
    ("keep", "length"),
    [
        ((2, 2), 4),  # short of all units: what is over repeats
        ((2, 0, 3), 6),  # nobody in a slot
        ((3, 2), 9),  # all units' places
        ((9, 4), 9),  # a dense row
        ((0, 0), 4),  # nobody at all
        ((3,), 5),  # one row in a longer list
    ],
)
def test_each_row_has_its_best_and_nothing_else(keep, length):
    scores = np.random.default_rng(3).integers(0, 6, (len(keep), UNITS)).astype(np.float32)  # ties
    kept, weight = jax.jit(best_of_rows, static_argnums=2)(scores, jnp.asarray(keep), length)
    kept, weight = np.asarray(kept), np.asarray(weight)
    assert kept.shape == (length,) and weight.shape == (len(keep), length)
    assert (kept >= 0).all() and (kept < UNITS).all()
    found = np.zeros(scores.shape)
    for row in range(len(keep)):
        np.add.at(found[row], kept, weight[row])
    order = np.argsort(-scores, axis=-1, kind="stable")
    wanted = np.zeros(scores.shape)
    for row, count in enumerate(keep):
        wanted[row, order[row, :count]] = 1
    assert np.array_equal(found, wanted)  # once, so no unit is counted twice
    used = wanted.any(0)
    read = 1 + np.count_nonzero(np.diff(kept))  # a kernel reads a repeated unit once
    assert read <= max(used.sum() + (length == UNITS), 1)
    if length == UNITS:
        assert np.array_equal(kept[used], np.flatnonzero(used))


def test_one_row_keeps_the_whole_list():
    scores = jnp.asarray([[0.1, 3.0, 2.0, 3.0, -1.0]])
    kept, weight = best_of_rows(scores, None, 3)
    assert weight is None and kept.tolist() == [1, 2, 3]
