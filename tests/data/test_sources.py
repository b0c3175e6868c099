"""Files of conversations: the forms that are read, and one clear line for each broken one."""

from __future__ import annotations

import gzip
import json

import pytest

from moejax.core.errors import InputError
from moejax.data.examples import encode_record, pair
from moejax.data.load import DataConfig, load_data
from moejax.data.sources import load_records, record_from_row, split_heldout
from moejax.io.tokenizer import Tokenizer
from tests.tiny_tokenizer import gguf_fields

QUESTION = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write(path, *lines: str) -> str:
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": QUESTION},
        {"instruction": "q", "response": "a", "source": 3},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answer": "a", "messages": None},
    ],
)
def test_forms_of_a_row(row):
    record = record_from_row(row, "f:1")
    assert (record.id, list(record.messages)) == ("f:1", QUESTION)


def test_alpaca_input_stands_below_its_instruction():
    record = record_from_row({"instruction": "q", "input": "x", "output": "a"}, "f:1")
    assert record.messages[0]["content"] == "q\n\nx"


def test_json_lines_plain_and_compressed(tmp_path):
    lines = [json.dumps({"prompt": f"é{i}", "completion": "a"}, ensure_ascii=False) for i in (0, 1)]
    plain = write(tmp_path / "a.jsonl", "\ufeff" + lines[0], "", lines[1], "")
    records = load_records(plain)
    assert [r.id for r in records] == [f"{plain}:1", f"{plain}:3"]
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert [r.messages for r in load_records(str(packed))] == [r.messages for r in records]
    assert len(load_records(plain, limit=1)) == 1


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"instruction": ["q", "q2"], "response": ["a", "a2"]})
    parquet.write_table(table, path)
    assert list(load_records(str(path))[0].messages) == QUESTION
    messages = pyarrow.Table.from_pylist([{"messages": QUESTION}])
    parquet.write_table(messages, path)
    assert list(load_records(str(path))[0].messages) == QUESTION
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="no readable parquet file"):
        load_records(str(path))


GOOD = '{"prompt": "q", "completion": "a"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "q"', r"a\.jsonl:2: broken JSON: .* at column"),
        ('["q", "a"]', r"a\.jsonl:2: a list, not an object"),
        ('{"text": "q"}', r"a\.jsonl:2: has the fields text, but needs messages, conv"),
        ('{"prompt": "q"}', r"a\.jsonl:2: has the fields prompt, but"),
        ('{"prompt": "q", "completion": " "}', r"a\.jsonl:2: field 'completion' is blank"),
        ('{"prompt": 3, "completion": "a"}', r"a\.jsonl:2: field 'prompt' is a int"),
        ('{"messages": "hi"}', r"a\.jsonl:2: messages is a str"),
        ('{"messages": [{"role": "user"}]}', r"a\.jsonl:2: message 0: 'content' must be a text"),
        ('{"messages": ["a"]}', r"a\.jsonl:2: message 0 is a str"),
        ('{"messages": []}', r"a\.jsonl:2: no assistant message with content \(roles: none\)"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, line, message):
    source = write(tmp_path / "a.jsonl", GOOD, line, GOOD)
    with pytest.raises(InputError, match=message) as error:
        load_records(source)
    assert "\n" not in str(error.value)


def test_a_folder_is_read_by_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [json.dumps({"prompt": f"q{i}", "completion": "a"}) for i in range(5)]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-1.jsonl", *rows[:2])
    write(tmp_path / "data" / "train-2.jsonl", *rows[2:])
    found = load_records(str(tmp_path / "data"), limit=4)
    assert [r.messages[0]["content"] for r in found] == ["q0", "q1", "q2", "q3"]
    assert found[3].id == f"{tmp_path / 'data'}[train]:4"
    with pytest.raises(InputError, match="the folder .* could not be loaded"):
        load_records(str(tmp_path / "data"), split="test")


def test_sources_that_are_none(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, message in (
        (write(tmp_path / "a.jsonl"), "holds no rows"),
        (write(tmp_path / "a.csv", "x"), "unknown file type; known are .jsonl"),
        (str(empty), "is a folder without .jsonl or .parquet files"),
        (str(tmp_path / "no.jsonl"), "does not exist"),
        ("someone/not-a-data-set", "no file someone/not-a-data-set, and the hub data set"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_records(source)
        assert "\n" not in str(error.value)
    (tmp_path / "b.jsonl").write_bytes(GOOD.encode() + b'\n{"prompt": "\xff"}')
    with pytest.raises(InputError, match=r"b\.jsonl:2: not UTF-8"):
        load_records(str(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 99)[:-9])
    with pytest.raises(InputError, match="the archive is damaged"):
        load_records(str(tmp_path / "c.jsonl.gz"))


def test_split_goes_by_the_question_not_by_the_order():
    records = [pair(str(i), f"q{i % 40}", f"a{i}") for i in range(80)]
    train, heldout = split_heldout(records, 0.25)
    assert len(train) + len(heldout) == 80 and 8 <= len(heldout) <= 32
    questions = [{r.messages[0]["content"] for r in side} for side in (train, heldout)]
    assert not questions[0] & questions[1]
    again, _ = split_heldout(records[::-1], 0.25)
    assert {r.id for r in again} == {r.id for r in train}


def test_load_data_from_a_file(tmp_path):
    lines = [json.dumps({"prompt": f"q{i}", "completion": "a"}) for i in range(60)]
    config = DataConfig(source=write(tmp_path / "a.jsonl", *lines), num_heldout=5, seed=1)
    data, again = load_data(config), load_data(config)
    assert data == again
    assert len(data.heldout) == data.summary["heldout_used"] == 5
    assert len(data.train) == data.summary["train"] > 30
    assert json.loads(json.dumps(data.summary)) == data.summary


def test_a_record_that_cannot_be_encoded_is_named():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer.from_gguf_metadata(gguf_fields(chat_template=template))
    with pytest.raises(InputError, match="f:7: the chat template writes no end-of-turn"):
        encode_record(pair("f:7", "q", "a"), tokenizer)


def test_the_form_of_bespoke_stratos():
    row = {"system": "Think.", "conversations": [{"from": "user", "value": "2 + 2?"},
                                                 {"from": "gpt", "value": "4"}]}
    assert record_from_row(row, "here").messages == (
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    )
    with pytest.raises(InputError, match="here: message 0: 'content' must be a text"):
        record_from_row({"conversations": [{"from": "human"}]}, "here")
    with pytest.raises(InputError, match="is a str, not a list"):
        record_from_row({"conversations": "x"}, "here")
