"""Data read by shares: any number of processes plan the same rows, and each reads its own."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.data.examples import encode_records
from moejax.data.load import DataConfig, load_data
from moejax.data.loader import batches
from moejax.data.packing import pack
from moejax.data.rows import open_rows, part_of
from moejax.data.shared import RowsConfig, arrange, load_shared, open_examples, shares_of
from moejax.io.tokenizer import Tokenizer
from tests.tiny_tokenizer import gguf_fields

TOKENIZER = Tokenizer.from_gguf_metadata(gguf_fields())
ROWS = RowsConfig(24, TOKENIZER.pad_id)


@pytest.fixture(scope="module", params=("jsonl", "parquet"))
def config(request, tmp_path_factory) -> DataConfig:
    """60 conversations of 10 to 40 tokens; a blank line in between."""
    rng = np.random.default_rng(0)
    made = [
        {"prompt": f"hello {i}", "completion": "ab " * int(rng.integers(1, 9)) + str(i)}
        for i in range(60)
    ]
    path = tmp_path_factory.mktemp("shared") / f"data.{request.param}"
    if request.param == "jsonl":
        lines = [json.dumps(row) for row in made]
        path.write_text("\n".join([*lines[:20], "", *lines[20:]]) + "\n")
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(made), path, row_group_size=7)
    return DataConfig(str(path), heldout_share=0.2, num_heldout=5, seed=1)


def parts(config: DataConfig, count: int):
    return list(shares_of(lambda: open_examples(config, TOKENIZER, ROWS.seq_len)[0], count))


def test_one_process_packs_what_was_packed_before(config):
    shared = load_shared(config, TOKENIZER, ROWS)
    data = load_data(config)
    for mine, theirs, on_long in (
        (shared.train.packed(), data.train, "split"),
        (shared.heldout, data.heldout, "truncate"),
    ):
        whole = pack(encode_records(theirs, TOKENIZER), ROWS.seq_len, ROWS.pad_id, on_long)
        for name, array in whole.batch().items():
            np.testing.assert_array_equal(mine.batch()[name], array)
        assert mine.stats == whole.stats
    assert shared.train.stats.num_split > 3
    assert shared.summary["heldout_used"] == 5
    assert shared.examples.num_read == 60  # each once


@pytest.mark.parametrize("count", (2, 3, 7))
def test_any_number_of_processes_has_the_same_batches(config, count):
    wanted = arrange(parts(config, 1)[0], config, ROWS)
    one = batches(wanted.train, 6, seed=4)
    for index, examples in enumerate(parts(config, count)):
        assert examples.num_read <= -(-60 // count) + 4
        found = arrange(examples, config, ROWS)
        assert found.summary == wanted.summary and found.train.sha256 == wanted.train.sha256
        np.testing.assert_array_equal(found.heldout.tokens, wanted.heldout.tokens)
        several = batches(found.train, 6, seed=4)
        for step in (0, 9):
            mine = part_of(6, index % 6, 6)
            for name, array in several.rows(step, mine.start, mine.stop).items():
                np.testing.assert_array_equal(array, one(step)[name][mine.start : mine.stop])
        assert examples.num_read < 60


def test_lines_have_the_names_of_their_lines_and_any_cut_gives_all(config):
    rows = open_rows(config.source)
    whole = list(rows.share(0, 1))
    for count in (2, 5, 100):
        assert [row for i in range(count) for row in rows.share(i, count)] == whole
    assert [rows.where(key) for key, _ in whole] == [where for where, _ in rows.named()]
    assert all(rows.read(key) == row for key, row in whole[::7])
    limited = open_rows(config.source, limit=25)
    assert [row for i in range(3) for row in limited.share(i, 3)] == whole[:25]


def test_a_row_that_changed_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"prompt": f"hello {i}", "completion": "ab"}) for i in range(8)]
    path.write_text("\n".join(rows))
    config = DataConfig(str(path), heldout_share=0.0)
    first, _ = parts(config, 2)
    path.write_text("\n".join(rows).replace("hello 7", "hullo 7"))
    assert first[6].id and first[0].id
    with pytest.raises(InputError, match=r"a\.jsonl:8: not the row that was there"):
        first[7]
    path.write_text("\n".join(rows[:4]))
    with pytest.raises(InputError, match="has no line at byte .* any more: bring the file back"):
        first[5]


def test_a_broken_row_is_named_by_its_line_whoever_reads_it(tmp_path):
    path = tmp_path / "a.jsonl"
    good = '{"prompt": "q", "completion": "a"}\n'
    path.write_text(good * 9 + '{"prompt": "q"}\n' + good * 2)
    with pytest.raises(InputError, match=r"a\.jsonl:10: has the fields prompt, but needs"):
        parts(DataConfig(str(path)), 3)
