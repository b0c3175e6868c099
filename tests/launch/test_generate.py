"""generate as a user runs it: prompts from all sources, a chat on a terminal, what is refused."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from moejax.io.load import save_any
from moejax.io.loaded import Loaded
from moejax.io.tokenizer import Tokenizer
from moejax.models import transformer
from moejax.models.config import ModelConfig
from tests.tiny_tokenizer import gguf_fields

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "launch.generate", "--compile_cache="]

# Runs the command on each list of flags, in one process to import jax once.
ONE_AFTER_ANOTHER = """
import contextlib, io, json, sys
from absl.testing import flagsaver
from launch import cli, generate
for argv, piped in json.load(sys.stdin):
    out, error = io.StringIO(), io.StringIO()
    sys.stdin = io.StringIO(piped)
    with flagsaver.flagsaver(), contextlib.redirect_stderr(error), contextlib.redirect_stdout(out):
        sys.argv = ["generate", "--compile_cache=", *argv]
        try:
            cli.run(generate.main)
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), error.getvalue()]))
"""


def environment() -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu"}


def run_all(*cases: tuple[list[str], str]) -> list[tuple[int, str, str]]:
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER],
        cwd=ROOT,
        env=environment(),
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A model of one tiny layer with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("generate") / "model"
    tokenizer = Tokenizer.from_gguf_metadata(gguf_fields())
    config = ModelConfig("llama", tokenizer.vocab_size, 1, 16, 24, 2, 1, 8, max_position=96)
    params = jax.jit(transformer.init_params, static_argnums=0)(config, jax.random.key(0))
    save_any(Loaded(params, config, tokenizer), path, "hf")
    return str(path)


def test_prompts_come_from_flags_files_and_pipes(model, tmp_path):
    texts = ["hello", "ab"]
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        json.dumps({"messages": [{"role": "user", "content": texts[0]}]})
        + "\n\n"
        + json.dumps(texts[1])
        + "\n"
    )
    common = [f"--model={model}", "--max_new_tokens=6", "--temperature=1", "--top_k=40"]
    out = tmp_path / "answers.jsonl"
    flagged, listed, piped, written, alone = run_all(
        ([*common, "--prompt=hello", "--prompt=ab"], ""),
        ([*common, f"--prompts={file}"], ""),
        (common, "hello\n\nab\n"),
        ([*common, f"--prompts={file}", f"--out={out}"], ""),
        ([*common, "--prompt=hello"], ""),
    )
    assert [flagged[0], listed[0], piped[0], written[0], alone[0]] == [0] * 5, written[2]
    assert flagged[1] == listed[1] == piped[1]
    assert flagged[1].startswith("--- 0\n")
    assert "2 answers, " in flagged[2] and "tokens/s" in flagged[2]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert written[1] == ""
    assert [record["prompt"] for record in records] == [
        [{"role": "user", "content": "hello"}],
        "ab",
    ]
    for record in records:
        assert record["answer"] in flagged[1]
        assert 0 <= record["num_tokens"] <= 6
        assert record["finished"] or record["num_tokens"] == 6
    assert alone[1] == records[0]["answer"] + "\n", "streamed alone, as in the batch"


def test_a_dry_run_says_what_it_takes_and_reads_no_weights(model, tmp_path):
    out = tmp_path / "answers.jsonl"
    some, none = run_all(
        ([f"--model={model}", "--prompt=hello", f"--out={out}", "--dry_run"], ""),
        ([f"--model={model}", "--dry_run"], "not read"),
    )
    assert some[0] == none[0] == 0
    for word in ("weights", "kB a token", "lengths", "a cache of up to"):
        assert word in some[1]
    assert not out.exists()
    assert "prompts  from the standard input" in none[1]


def test_bad_input_is_one_line(model, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('"fine"\n{"prompt": \n')
    shapeless = tmp_path / "shapeless.jsonl"
    shapeless.write_text('{"question": "?"}\n')
    prompt = [f"--model={model}", "--prompt=hello"]
    cases = {
        "--model is missing": (["--prompt=hello"], ""),
        "nowhere is missing": (["--model=nowhere", "--prompt=hello"], ""),
        "holds no prompt": ([f"--model={model}"], "\n"),
        "a prompt is empty": ([f"--model={model}", "--prompt="], ""),
        "tokens and the model reads 96": ([f"--model={model}", "--prompt=" + "ab " * 200], ""),
        "temperature must be 0 (greedy) or more, got -1.0": ([*prompt, "--temperature=-1"], ""),
        "top_k must be a whole number, 0 (off) or more, got -3": ([*prompt, "--top_k=-3"], ""),
        "top_p must be above 0 and at most 1 (off), got 0.0": ([*prompt, "--top_p=0"], ""),
        "min_p must be between 0 (off) and 1, got 2.0": ([*prompt, "--min_p=2"], ""),
        "max_new_tokens must be 1 or more, got 0": ([*prompt, "--max_new_tokens=0"], ""),
        "choose one": ([*prompt, "--prompts=x.jsonl"], ""),
        "leave one out": ([*prompt, "--raw", "--system=Be brief."], ""),
        "its folder is missing": ([*prompt, f"--out={tmp_path}/no/a.jsonl"], ""),
        "absent.jsonl": ([f"--model={model}", f"--prompts={tmp_path}/absent.jsonl"], ""),
        "line 2 is not JSON": ([f"--model={model}", f"--prompts={broken}"], ""),
        "line 1 is no prompt": ([f"--model={model}", f"--prompts={shapeless}"], ""),
        "unexpected argument 'hello'": ([f"--model={model}", "hello"], ""),
    }
    for message, (code, out, error) in zip(cases, run_all(*cases.values()), strict=True):
        assert code == 2, (message, code, error)
        assert error.startswith("error: ") and message in error, error
        assert error.count("\n") == 1 and out == "", error


def test_a_chat_keeps_its_history_until_reset(model):
    """On a real terminal: the second turn's prompt is longer than the context leaves room for."""
    ours, theirs = pty.openpty()
    flags = [f"--model={model}", "--max_new_tokens=4"]
    child = subprocess.Popen(
        [*COMMAND, *flags],
        cwd=ROOT,
        env=environment(),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(theirs)
    long = "ab " * 16
    for line in (long, long, "/reset", long, "", "/quit"):
        os.write(ours, (line + "\n").encode())
    out, error = child.communicate(timeout=240)
    os.close(ours)
    assert child.returncode == 0, error
    assert "/reset forgets the conversation" in out
    # The first and the third turn are answered; the second is refused and the chat goes on.
    assert error.count("error: ") == 1 and "the model reads 96" in error, error
    first, third = (piece.splitlines()[0] for piece in (out.split("> ")[1], out.split("> ")[4]))
    assert first and first == third
