"""evaluate as a user runs it: a tiny model, samples made elsewhere, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from moejax.evals.tasks import load_items
from moejax.evals.tasks.functions import FUNCTIONS
from moejax.io.load import save_any
from moejax.io.loaded import Loaded
from moejax.io.tokenizer import Tokenizer
from moejax.models import transformer
from moejax.models.config import ModelConfig
from tests import commands
from tests.tiny_tokenizer import gguf_fields

ROOT = commands.ROOT


# Runs the command on each list of flags, in one process to import jax once.
ONE_AFTER_ANOTHER = """
import contextlib, io, json, sys
from absl import flags
from absl.testing import flagsaver
from launch import cli, evaluate
for argv in json.load(sys.stdin):
    output, error = io.StringIO(), io.StringIO()
    redirected = contextlib.redirect_stdout(output), contextlib.redirect_stderr(error)
    with flagsaver.flagsaver(), redirected[0], redirected[1]:
        sys.argv = ["evaluate", "--compile_cache=", *argv]
        try:
            cli.run(evaluate.main)
        except SystemExit as stop:
            code = stop.code or 0
    print("END", json.dumps([code, error.getvalue(), output.getvalue()]))
"""


class End(NamedTuple):
    code: int
    error: str
    output: str


def one_after_another(*commands: list[str]) -> list[End]:
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER],
        input=json.dumps(commands),
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ends = [json.loads(row[4:]) for row in done.stdout.splitlines() if row.startswith("END ")]
    return [End(*end) for end in ends]


def samples(path: Path, field: str, **changes: str) -> str:
    """A file that answers every shipped task by its `field`, but for `changes`."""
    rows = [
        {"id": task.id, "completion": changes.get(task.id, task.row[field])}
        for task in load_items(FUNCTIONS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--samples={path}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of one tiny layer with a tokenizer, and thirty conversations."""
    path = tmp_path_factory.mktemp("evaluate")
    tokenizer = Tokenizer.from_gguf_metadata(gguf_fields())
    config = ModelConfig("llama", tokenizer.vocab_size, 1, 16, 24, 2, 1, 8, max_position=512)
    params = jax.jit(transformer.init_params, static_argnums=0)(config, jax.random.key(0))
    save_any(Loaded(params, config, tokenizer), path / "model", "hf")
    rows = [{"prompt": f"hello {i}", "completion": f"{i} ab\n"} for i in range(30)]
    (path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_functions_are_asked_graded_and_not_asked_again(folder):
    flags = ["--task=functions", f"--model={folder / 'model'}", f"--out={folder / 'functions'}"]
    flags += ["--num=3", "--max_new_tokens=4", "--batch_size=2", "--allow_code_execution"]
    done, other = one_after_another(flags, [*flags, "--max_new_tokens=5"])
    assert done.code == 0, done.error
    assert "pass@1 0.000 [0.000, 0.561], 3 tasks" in done.output
    assert other.code == 2 and other.error.count("\n") == 1
    assert "max_new_tokens (4 there, 5 here)" in other.error
    path = folder / "functions" / "samples.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["id"] for record in records] == ["add", "multiply", "square"]
    result = json.loads((folder / "functions" / "result.json").read_text())
    assert result["form"] == "chat" and result["pass_at_1_n"] == 3 and "jax" in str(result)
    path.write_text("".join(json.dumps({**r, "mark": 1}) + "\n" for r in records[:2]))
    # As a user runs it: a process of its own.
    again = commands.run("evaluate", *flags)
    assert again.returncode == 0, again.stderr
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record.get("mark") for record in found] == [1, 1, None]
    assert found[2]["completion"] == records[2]["completion"]


def test_a_models_folder_says_how_it_wants_to_be_asked(folder, tmp_path):
    flags = ["--task=functions", "--num=1", "--dry_run", f"--out={tmp_path / 'out'}"]
    for form in ("haiku", "fence"):
        shutil.copytree(folder / "model", tmp_path / form)
        (tmp_path / form / "prompt_forms.json").write_text(json.dumps({"functions": form}))
    haiku, fence = one_after_another(
        *([*flags, f"--model={tmp_path / form}"] for form in ("haiku", "fence"))
    )
    assert haiku.code == 2
    assert "prompt_forms.json: task functions has no prompt form 'haiku'" in haiku.error
    assert fence.code == 0 and "prompt form 'fence'" in fence.output


def test_held_out_loss_is_near_that_of_chance_for_a_random_model(folder):
    flags = ["--task=nll", f"--model={folder / 'model'}", f"--data={folder / 'data.jsonl'}"]
    flags += [f"--out={folder / 'nll'}", "--num=4", "--seq_len=64"]
    dry, done = one_after_another([*flags, "--dry_run", "--out=no/such"], flags)
    assert dry.code == 0 and "answer tokens" in dry.output and "GiB" in dry.output
    assert not (ROOT / "no").exists()
    assert done.code == 0, done.error
    result = json.loads((folder / "nll" / "result.json").read_text())
    low, high = result["nll_interval"]
    assert low <= result["nll"] <= high and 4 < result["nll"] < 7  # ln 270 = 5.6
    records = [json.loads(x) for x in (folder / "nll" / "samples.jsonl").read_text().splitlines()]
    assert sum(record["num_tokens"] for record in records) == result["nll_tokens"]


def test_what_is_refused_is_one_line_and_leaves_nothing(folder, tmp_path):
    lacking = tmp_path / "lacking.jsonl"
    lacking.write_text('{"id": "add", "completion": ""}\n')
    file = tmp_path / "file"
    file.write_text("")
    out, allow = f"--out={tmp_path / 'new'}", "--allow_code_execution"
    model, functions = f"--model={folder / 'model'}", "--task=functions"
    good = samples(tmp_path / "good.jsonl", "solution")
    cases = [
        ([], "--task is missing"),
        ([functions, model], "--out is missing"),
        ([functions, out], "--model is missing"),
        ([functions, out, model], "--allow_code_execution"),
        ([functions, out, good, "--noallow_code_execution"], "--allow_code_execution"),
        ([functions, out, good, model, allow], "without --model"),
        (["--task=nll", out, good], "--samples grades"),
        ([functions, out, f"--samples={lacking}", allow], "no sample for"),
        ([functions, out, "--samples=/no/such", allow], "/no/such: no such file"),
        ([functions, out, model, "--k=1,2", allow], "--k=1,2 must lie between 1 and"),
        ([functions, out, model, "--k=x", allow], "--k takes whole numbers"),
        ([functions, out, model, "--data=/no/such", allow], "/no/such does not exist"),
        ([functions, out, "--model=/no/such", allow, "--num=1"], "/no/such is missing"),
        (["--task=nll", out, model, "--data=/no/such.jsonl"], "/no/such.jsonl"),
        (["--task=poetry", out, model], "functions|humaneval"),
    ]
    ends = one_after_another(*(flags for flags, _ in cases))
    for (flags, message), (code, error, _) in zip(cases, ends, strict=True):
        assert code == 2 and message in error and error.count("\n") == 1, (flags, code, error)
        assert error.startswith("error: ")
    assert not (tmp_path / "new").exists()


def lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_other_tasks_from_samples_to_results(folder, tmp_path):
    """HumanEval's form with k; numbers with two models compared; choices; overlap carried."""
    code = {"task_id": "T/0", "prompt": "def f(x):\n", "entry_point": "f",
            "test": "def check(candidate):\n    assert candidate(1) == 2\n"}  # fmt: skip
    right, wrong = ({"task_id": "T/0", "completion": f"    return x {op} 1\n"} for op in "+-")
    sums = [{"id": str(i), "prompt": f"{i} and one more makes a sum of", "answer": i + 1}
            for i in range(4)]  # fmt: skip
    choices = [{"query": "hello", "choices": ["ab", "12"], "gold": i % 2} for i in range(4)]
    data = {name: lines(tmp_path / f"{name}.jsonl", *rows) for name, rows in
            {"code": [code], "sums": sums, "choices": choices,
             "two": [right, wrong], "part": [{"id": "0", "completion": "1"}],
             "good": [{"id": str(i), "completion": f"#### {i + 1}"} for i in range(4)],
             "bad": [{"id": str(i), "completion": "#### 1"} for i in range(4)],
            }.items()}  # fmt: skip
    overlap = {"n": 13, "least": 6, "data": ["train"], "num_texts": 1,
               "benchmarks": {"own": {"shares": {"0": 0.5, "1": 0, "2": 0, "3": 0}}}}  # fmt: skip
    (tmp_path / "overlap.json").write_text(json.dumps(overlap))
    own = ["--task=own", "--grader=number", f"--data={data['sums']}"]
    ends = one_after_another(
        [f"--samples={data['two']}", "--task=humaneval", f"--data={data['code']}", "--k=1,2"],
        [f"--samples={data['two']}", "--task=humaneval", f"--data={data['code']}", "--k=3"],
        [f"--samples={data['bad']}", *own],
        [f"--samples={data['good']}", *own, f"--versus={tmp_path / 'bad.own'}",
         f"--overlap={tmp_path / 'overlap.json'}"],
        [f"--samples={data['part']}", *own],
        [f"--samples={data['part']}", *own, "--partial"],
        [f"--samples={data['good']}", "--task=own", f"--data={data['sums']}"],
        [f"--samples={data['two']}", "--task=humaneval", f"--data={data['code']}",
         f"--overlap={tmp_path / 'overlap.json'}"],
        ["--task=choice", f"--model={folder / 'model'}", f"--data={data['choices']}", "--shots=1",
         f"--out={tmp_path / 'choice'}"],
        ["--task=functions", samples(tmp_path / "functions.jsonl", "solution",
                                     square="def square(x): return 2 * x")],
    )  # fmt: skip
    assert [end.code for end in ends] == [0, 2, 0, 0, 2, 0, 2, 2, 0, 0], ends
    assert "k = 3 needs as many samples; 'T/0' has 2" in ends[1][1]
    assert "no sample for 3 of 4 tasks: 1, 2, 3" in ends[4][1]
    assert "go together" in ends[6][1] and "no overlap of task humaneval" in ends[7][1]

    def result(name: str) -> dict:
        return json.loads((tmp_path / name / "result.json").read_text())

    assert result("two.humaneval")["pass_at_k"] == {"1": 0.5, "2": 1.0}
    programs = (tmp_path / "two.humaneval" / "evalplus.jsonl").read_text().splitlines()
    assert json.loads(programs[0]) == {
        "task_id": "T/0",
        "solution": code["prompt"] + right["completion"],
    }
    good = result("good.own")
    assert good["versus"]["difference"] == 0.75 and good["pass_at_1"] == 1
    assert good["decontamination"]["num_clean"] == 3 and good["model_xxh3"] is None
    records = [
        json.loads(x) for x in (tmp_path / "good.own/samples.jsonl").read_text().splitlines()
    ]
    assert [record["overlap"] for record in records] == [0.5, 0, 0, 0]
    assert result("part.own")["num_missing"] == 3
    assert result("functions.functions")["verdicts"] == {
        "pass": len(load_items(FUNCTIONS)) - 1,
        "wrong": 1,
    }
    choice = result("choice")
    assert choice["acc"] == 0.5 and len(choice["model_xxh3"]) == 32
