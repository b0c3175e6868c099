"""Packing: no token lost or moved, segments apart, what is too long is split, cut or dropped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.core.errors import InputError
from moejax.data.examples import Example
from moejax.data.packing import Sizes, pack, plan_rows

PAD = 0


def example(name: str, length: int, prompt: int) -> Example:
    """`prompt` tokens and then answer tokens; ids are positive and tell the examples apart."""
    ids = np.arange(length, dtype=np.int32) + 1000 * (1 + int(name))
    return Example(name, (), ids, np.arange(length) >= prompt)


SIZES = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1)))


@st.composite
def examples(draw):
    sizes = draw(st.lists(SIZES, min_size=1, max_size=30))
    return [example(str(i), n, prompt) for i, (n, prompt) in enumerate(sizes)]


def keeps_answer(e: Example, seq_len: int | None) -> bool:
    return bool(e.loss_mask[1:seq_len].any())


@given(examples(), st.integers(2, 48))
def test_every_example_is_one_unbroken_segment(made, seq_len):
    usable = [e for e in made if keeps_answer(e, seq_len)]
    if not usable:
        with pytest.raises(InputError, match="has an answer within"):
            pack(made, seq_len, PAD, "truncate")
        return
    packed = pack(made, seq_len, PAD, "truncate")
    seen = {}
    for row, names in enumerate(packed.ids):
        for segment, name in enumerate(names, start=1):
            at = np.flatnonzero(packed.segment_ids[row] == segment)
            assert (np.diff(at) == 1).all()
            seen[name] = (packed.tokens[row, at], packed.loss_mask[row, at])
            np.testing.assert_array_equal(packed.positions[row, at], np.arange(len(at)))
    assert set(seen) == {e.id for e in usable}
    for e in usable:
        tokens, mask = seen[e.id]
        np.testing.assert_array_equal(tokens, e.ids[:seq_len])
        np.testing.assert_array_equal(mask[1:], e.loss_mask[1:seq_len])
        assert mask[0] == 0
    pads = packed.segment_ids == 0
    assert (packed.tokens[pads] == PAD).all()
    assert not packed.positions[pads].any() and not packed.loss_mask[pads].any()


@given(examples(), st.integers(2, 48))
def test_split_loses_no_token_and_no_loss(made, seq_len):
    usable = [e for e in made if e.loss_mask[1:].any()]
    if not usable:
        return
    packed = pack(made, seq_len, PAD)  # the default
    tokens, counted = {}, {}
    for row, names in enumerate(packed.ids):
        for segment, name in enumerate(names, start=1):
            at = np.flatnonzero(packed.segment_ids[row] == segment)
            np.testing.assert_array_equal(packed.positions[row, at], np.arange(len(at)))
            assert packed.loss_mask[row, at[0]] == 0
            name, _, first = name.partition("+")
            first = int(first or 0)
            for place, token, mask in zip(
                range(first, first + len(at)),
                packed.tokens[row, at],
                packed.loss_mask[row, at],
                strict=True,
            ):
                tokens.setdefault(name, {})[place] = token
                counted.setdefault(name, {}).setdefault(place, 0)
                counted[name][place] += mask
    assert set(tokens) == {e.id for e in usable}
    for e in usable:
        np.testing.assert_array_equal([tokens[e.id][i] for i in range(len(e.ids))], e.ids)
        found = [counted[e.id][i] for i in range(len(e.ids))]
        assert found[1:] == e.loss_mask[1:].tolist() and found[0] == 0  # once each
    assert packed.stats.num_answer_tokens == sum(int(e.loss_mask[1:].sum()) for e in usable)
    assert packed.stats.num_split == sum(len(e.ids) > seq_len for e in usable)


@given(examples(), st.integers(8, 48), st.sampled_from(("split", "truncate", "drop")))
def test_stats_add_up(made, seq_len, on_long):
    fit = {
        "split": lambda e: keeps_answer(e, None),
        "truncate": lambda e: keeps_answer(e, seq_len),
        "drop": lambda e: keeps_answer(e, None) and len(e.ids) <= seq_len,
    }[on_long]
    if not any(map(fit, made)):
        return
    packed = pack(made, seq_len, PAD, on_long)
    stats = packed.stats
    dropped = [e for e in made if not fit(e)]
    assert stats.num_dropped == len(dropped)
    assert stats.num_examples + stats.num_dropped == len(made)
    total = sum(len(e.ids) for e in made) - sum(len(e.ids) for e in dropped)
    assert stats.num_tokens + stats.num_tokens_cut - stats.num_repeated == total
    assert stats.num_tokens == (packed.segment_ids > 0).sum()
    assert stats.num_answer_tokens == packed.loss_mask.sum()
    assert stats.padding_share == pytest.approx(1 - stats.num_tokens / packed.tokens.size)


@given(examples(), st.integers(8, 48))
def test_first_fit_leaves_no_room_that_a_later_row_could_have_used(made, seq_len):
    if not any(keeps_answer(e, seq_len) for e in made):
        return
    packed = pack(made, seq_len, PAD, "truncate")
    used = (packed.segment_ids > 0).sum(axis=1)
    first = (packed.segment_ids == 1).sum(axis=1)
    for row in range(1, len(used)):
        assert (used[:row] + first[row] > seq_len).all()


def test_arrays_have_the_types_of_a_batch():
    packed = pack([example("0", 5, 2), example("1", 3, 1)], 8, PAD)
    batch = packed.batch()
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
        "tokens": ("int32", (1, 8)),
        "segment_ids": ("int32", (1, 8)),
        "positions": ("int32", (1, 8)),
        "loss_mask": ("float32", (1, 8)),
    }
    assert packed.ids == (("0", "1"),)
    assert batch["segment_ids"].tolist() == [[1] * 5 + [2] * 3]


def test_an_answer_cut_away_is_dropped_and_counted():
    made = [example("0", 20, 10), example("1", 20, 4), example("2", 4, 1)]
    stats = pack(made, 8, PAD, "truncate").stats
    assert (stats.num_dropped, stats.num_truncated, stats.num_tokens_cut) == (1, 1, 12)
    stats = pack(made, 8, PAD, "drop").stats
    assert (stats.num_dropped, stats.num_examples, stats.num_rows) == (2, 1, 1)
    with pytest.raises(InputError, match="2 of 3 examples are longer than 8 tokens"):
        pack(made, 8, PAD, "error")
    with pytest.raises(InputError, match="on_long 'cut' is unknown: use split, truncate"):
        pack(made, 8, PAD, "cut")


def test_the_search_finds_what_looking_at_every_row_finds():
    lengths = np.random.default_rng(0).integers(40, 400, 2000)
    rooms, wanted = [], []
    for length in lengths:
        row = next((row for row, room in enumerate(rooms) if room >= length), len(rooms))
        rooms += [512] * (row == len(rooms))
        rooms[row] -= length
        wanted.append(row)
    pieces = plan_rows(Sizes(lengths, lengths, lengths), 512).pieces
    assert pieces[np.argsort(pieces[:, 1]), 0].tolist() == wanted


def test_too_short_rows_are_refused():
    with pytest.raises(InputError, match="sequence length 1 is too short"):
        pack([example("0", 4, 1)], 1, PAD)
