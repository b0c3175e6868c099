"""inspect_data as a user runs it."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from moejax.io.tokenizer import Tokenizer
from tests import commands
from tests.tiny_tokenizer import gguf_fields, smollm2_gguf

inspect = functools.partial(commands.run, "inspect_data")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Tokenizer.from_gguf_metadata(gguf_fields()).save(tmp_path / "model")
    rows = [{"prompt": f"hello {i}", "completion": "12 ab\n"} for i in range(9)]
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def test_tokens_and_mask_in_plain_text(folder):
    done = inspect(f"--tokenizer={folder / 'model'}", f"--data={folder / 'data.jsonl'}", "--num=1")
    assert done.returncode == 0, done.stderr
    assert "|[[1|2| |ab|\\n\n|<|im_end|>|]]\\n" in done.stdout
    assert done.stdout.count("--- ") == 1
    assert "0 truncated (0 tokens cut), 0 dropped" in done.stdout
    assert "WARNING" not in done.stdout and "\x1b[" not in done.stdout


def test_colour_and_a_row_too_short_for_any_end_of_turn(folder):
    flags = [f"--tokenizer={folder / 'model'}", f"--data={folder / 'data.jsonl'}", "--num=1"]
    done = inspect(*flags, "--color", "--seq_len=26", "--on_long=truncate")
    assert done.returncode == 0, done.stderr
    assert "\x1b[32m1" in done.stdout and "[[" not in done.stdout.replace("\x1b[", "")
    assert "WARNING: no example has its end-of-turn token in the loss" in done.stdout


def test_smollm2_on_the_standard_library_without_showing_any():
    done = inspect(f"--tokenizer={smollm2_gguf()}", "--data=stdlib", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "rows of 128" in done.stdout and "--- " not in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data=stdlib"], "error: --tokenizer is missing"),
        (["--tokenizer=/nowhere"], "error: /nowhere is missing; name a model folder"),
        (["--tokenizer=.", "--num=1"], "error: . has no tokenizer.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message):
    done = inspect(*flags)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(message)
