"""Batches depend on the step alone and pass over every row once an epoch."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data.examples import Example
from moejax.data.loader import batches, fixed_batches
from moejax.data.packing import Packed, pack

NUM_ROWS = 10


@pytest.fixture(scope="module")
def packed() -> Packed:
    """Ten rows of one example each; a row's tokens are its number."""
    mask = np.array([False, True, True, True])
    made = [Example(str(i), (), np.full(4, i + 1, dtype=np.int32), mask) for i in range(NUM_ROWS)]
    return pack(made, 4)


def first_tokens(batch) -> list[int]:
    return batch["tokens"][:, 0].tolist()


def test_a_step_gives_the_same_batch_whenever_it_is_asked(packed):
    running = batches(packed, 4, seed=3)
    history = [running(step) for step in range(12)]
    resumed = batches(packed, 4, seed=3)
    for step in (11, 0, 7, 7):
        for name, array in resumed(step).items():
            np.testing.assert_array_equal(array, history[step][name])
            assert array.dtype == history[step][name].dtype


def test_every_epoch_has_every_row_once_in_another_order(packed):
    step_to_batch = batches(packed, 4, seed=0)
    stream = [t for step in range(10) for t in first_tokens(step_to_batch(step))]
    epochs = [stream[i : i + NUM_ROWS] for i in range(0, len(stream), NUM_ROWS)]
    assert all(sorted(epoch) == list(range(1, NUM_ROWS + 1)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_seed_decides_the_order(packed):
    order = [first_tokens(batches(packed, NUM_ROWS, seed=s)(0)) for s in (0, 0, 1)]
    assert order[0] == order[1] != order[2]
    assert first_tokens(batches(packed, NUM_ROWS, shuffle=False)(5)) == list(range(1, 11))


def test_fixed_batches_pad_the_last_one_with_rows_that_count_nothing(packed):
    parts = list(fixed_batches(packed, 4))
    assert [len(p["tokens"]) for p in parts] == [4, 4, 4]
    assert [t for p in parts for t in first_tokens(p)][:NUM_ROWS] == list(range(1, 11))
    tail = {name: array[2:] for name, array in parts[-1].items()}
    assert not any(array.any() for array in tail.values())
    assert sum(p["loss_mask"].sum() for p in parts) == packed.stats.num_answer_tokens
    assert all(p[n].dtype == packed.batch()[n].dtype for p in parts for n in p)


@pytest.mark.parametrize("size", (0, NUM_ROWS + 1))
def test_batch_size_must_fit_the_data(packed, size):
    with pytest.raises(InputError, match=f"batch size {size}, but the data packs into 10 rows"):
        batches(packed, size)


def test_a_stream_goes_on_where_its_state_says(packed):
    stream = batches(packed, 4, seed=3)
    wanted = [first_tokens(stream(step)) for step in range(8)]
    state = json.loads(json.dumps(stream.state(5)))
    assert (state["next_row"], state["epoch"], state["row_of_epoch"]) == (20, 2, 0)
    resumed = batches(packed, 4, seed=3)
    resumed.resume(5, state)
    assert [first_tokens(resumed(step)) for step in (5, 6, 7)] == wanted[5:]
    # The rest is what was left, also in batches of another size and steps of another count.
    other = batches(packed, 2, seed=3)
    other.resume(1, state)
    assert first_tokens(other(1)) + first_tokens(other(2)) == wanted[5]
    assert other.state(3)["next_row"] == 24


def test_another_stream_is_refused(packed):
    state = batches(packed, 4, seed=3).state(2)
    for other, name in (({**state, "seed": 4}, "seed"), ({**state, "rows_sha256": "0"}, "rows")):
        with pytest.raises(InputError, match=f"step 2 stopped in other data: its {name}"):
            batches(packed, 4, seed=3).resume(2, other)


def test_negative_steps_are_refused(packed):
    with pytest.raises(InputError, match="step -1 is negative"):
        batches(packed, 4)(-1)
