"""Measures a model: held-out loss, or the share of small Python functions it writes correctly.

  python -m launch.evaluate --model=MODEL --task=functions --out=DIR --allow_code_execution
  python -m launch.evaluate --model=MODEL --task=nll --data=stdlib --num=64 --out=DIR
  python -m launch.evaluate --samples=FILE.jsonl --task=functions --out=DIR --allow_code_execution

MODEL is a model folder, a .gguf file or a hub id. DIR gets samples.jsonl, one record per answer or
example, and result.json. Run again with the same --out and the same flags, it goes on where it
stopped. --task=functions runs programs that the model wrote, in a sandbox (moejax/evals/sandbox.py
says what it holds back), and does so only with --allow_code_execution. A file of samples made
elsewhere has "id" (a task's) and "completion" on each line.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn

from launch import cli
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.data.examples import encode_records
from moejax.data.load import DataConfig, load_data
from moejax.data.packing import Packed, pack
from moejax.evals import functions, nll, sandbox
from moejax.evals.functions import FunctionsConfig
from moejax.evals.samples import read_samples, write_samples
from moejax.evals.sandbox import Limits
from moejax.evals.tasks_functions import PROMPT_FORMS, FunctionTask, load_tasks
from moejax.io.atomic import write_json
from moejax.io.load import Loaded, load_any
from moejax.serve.generate import GenerateConfig, generate, prepare
from moejax.serve.sampling import SamplingConfig
from moejax.train.loop import claim_folder

MODEL = flags.DEFINE_string("model", None, "Model folder, .gguf file or hub id.")
TASK = flags.DEFINE_enum("task", None, ["functions", "nll"], "What to measure.")
OUT = flags.DEFINE_string("out", None, "Folder for samples.jsonl and result.json.")
SAMPLES = flags.DEFINE_string("samples", None, "Grade this JSONL file; no model is loaded.")
DATA = flags.DEFINE_string(
    "data",
    None,
    "functions: a JSONL file of tasks (default: the shipped ones). nll: stdlib (default), "
    "a .jsonl, .jsonl.gz or .parquet file, or a hub data set.",
)
NUM = flags.DEFINE_integer("num", 64, "Most tasks or held-out examples.", lower_bound=1)
FORM = flags.DEFINE_enum("form", "chat", list(PROMPT_FORMS), "How function tasks are asked.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Answers per function task.", lower_bound=1)
K = flags.DEFINE_list("k", ["1"], "Pass@k is reported for these, at most --num_samples.")
NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Per answer.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", lower_bound=0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "Nucleus of the sampling.", 0.0, 1.0)
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling and of the order of the data.")
BATCH = flags.DEFINE_integer("batch_size", None, "Rows at a time; default 32, for nll 4.")
SEQ_LEN = flags.DEFINE_integer("seq_len", 512, "Tokens per packed row (nll).", lower_bound=2)
WALL_S = flags.DEFINE_float("wall_s", 5.0, "Seconds one program may run.", lower_bound=0.1)
EXECUTE = flags.DEFINE_bool(
    "allow_code_execution", False, "Run the programs that the model wrote, in the sandbox."
)
CLAIM = "evaluate.json"  # in the folder: whose it is
console = Console(highlight=False, soft_wrap=True)


def main(argv: Sequence[str]) -> None:
    del argv
    _require(TASK.value, "task", "functions or nll")
    _require(OUT.value, "out", "a folder for the results")
    if SAMPLES.value is None:
        _require(MODEL.value, "model", "a model folder, a .gguf file or a hub id")
    elif TASK.value != "functions" or MODEL.value is not None:
        raise InputError("--samples grades a file with --task=functions and without --model")
    began = time.perf_counter()
    outcome = evaluate_nll() if TASK.value == "nll" else evaluate_functions()
    if outcome is None:
        return
    settings, records, result = outcome
    folder = _folder()
    write_samples(folder / "samples.jsonl", records)
    environment = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
    }
    wall_s = round(time.perf_counter() - began, 2)
    write_json(
        folder / "result.json",
        {**settings, **result, "wall_s": wall_s, "environment": environment},
    )
    console.print(f"results: {folder / 'result.json'}", markup=False)


# -- functions -------------------------------------------------------------------------------------

Outcome = tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]


def evaluate_functions() -> Outcome | None:
    """Asks for functions, or grades a file of them, and prints Pass@k; None for a dry run."""
    tasks = load_tasks(DATA.value)[: NUM.value]
    config = FunctionsConfig(
        form=FORM.value,
        num_samples=NUM_SAMPLES.value,
        chunk_size=BATCH.value or 32,
        seed=SEED.value,
        limits=Limits(wall_s=WALL_S.value),
        allow_code_execution=EXECUTE.value,
    )
    ks = _ks(None if SAMPLES.value else NUM_SAMPLES.value)
    if cli.DRY_RUN.value:
        _plan_functions(tasks, config)
        return None
    sandbox.require_permission(EXECUTE.value)
    mode = sandbox.working_mode()
    if SAMPLES.value is not None:
        settings: dict[str, Any] = {"task": "functions", "samples": SAMPLES.value, "sandbox": mode}
        samples = read_samples(Path(SAMPLES.value), [task.id for task in tasks])
        claim_folder(_folder(), settings | {"num_tasks": len(tasks)}, CLAIM)
        records = functions.grade(samples, tasks, config)
    else:
        loaded = _load_model()
        settings = _functions_settings(tasks, config) | {"sandbox": mode}
        claim_folder(_folder(), settings, CLAIM)
        records = _generate_and_grade(loaded, tasks, config)
    result = functions.summary(records, ks)
    low, high = result["pass_at_1_interval"]
    console.print(
        f"pass@1 {result['pass_at_1']:.3f} [{low:.3f}, {high:.3f}], {len(tasks)} tasks; "
        + ", ".join(f"{word} {count}" for word, count in result["verdicts"].items()),
        markup=False,
    )
    return settings, records, result


def _functions_settings(tasks: Sequence[FunctionTask], config: FunctionsConfig) -> dict[str, Any]:
    return {
        "task": "functions",
        "model": MODEL.value,
        "data": DATA.value or "shipped",
        "num_tasks": len(tasks),
        "form": config.form,
        "num_samples": config.num_samples,
        "chunk_size": config.chunk_size,
        "seed": config.seed,
        "max_new_tokens": NEW_TOKENS.value,
        "temperature": TEMPERATURE.value,
        "top_p": TOP_P.value,
        "limits": dataclasses.asdict(config.limits),
    }


def _generate_and_grade(
    loaded: Loaded, tasks: Sequence[FunctionTask], config: FunctionsConfig
) -> list[dict[str, Any]]:
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    params = prepare(loaded.params)
    settings = GenerateConfig(
        max_new_tokens=NEW_TOKENS.value,
        sampling=SamplingConfig(temperature=TEMPERATURE.value, top_p=TOP_P.value),
        stop_ids=tuple(tokenizer.eos_ids),
        batch_size=config.chunk_size,
    )
    path = _folder() / "samples.jsonl"
    done = read_samples(path, [task.id for task in tasks], partial=True) if path.is_file() else []
    total = len(tasks) * config.num_samples
    with _progress() as progress:
        bar = progress.add_task("functions", total=total, score="")

        def show(records):
            write_samples(path, records)
            passed = sum(record["passed"] for record in records)
            score = f"passed {passed} of {len(records)}"
            progress.update(bar, completed=len(records), score=score)

        return functions.run_functions(
            lambda prompts, seed: generate(
                params, loaded.config, prompts, dataclasses.replace(settings, seed=seed)
            ),
            tokenizer,
            tasks,
            config,
            done=done,
            on_records=show,
        )


def _plan_functions(tasks: Sequence[FunctionTask], config: FunctionsConfig) -> None:
    where = sandbox.working_mode()
    console.print(
        f"{len(tasks)} tasks x {config.num_samples} answers, prompt form {config.form!r}, "
        f"at most {NEW_TOKENS.value} new tokens; sandbox mode {where!r}",
        markup=False,
    )
    if SAMPLES.value is None:
        _describe(_load_model())


# -- held-out loss ---------------------------------------------------------------------------------


def evaluate_nll() -> Outcome | None:
    """Reads held-out examples and prints nats per answer token; None for a dry run."""
    loaded = _load_model()
    packed = _heldout(loaded)
    batch_size = BATCH.value or 4
    if cli.DRY_RUN.value:
        _describe(loaded)
        stats = packed.stats
        console.print(
            f"{stats.num_examples} examples in {stats.num_rows} rows of {SEQ_LEN.value}, "
            f"{stats.num_answer_tokens} answer tokens",
            markup=False,
        )
        return None
    settings = {
        "task": "nll",
        "model": MODEL.value,
        "data": DATA.value or "stdlib",
        "num": NUM.value,
        "seq_len": SEQ_LEN.value,
        "seed": SEED.value,
        "tokens_sha256": nll.tokens_hash(packed),
    }
    claim_folder(_folder(), settings, CLAIM)
    with _progress() as progress:
        bar = progress.add_task("held-out loss", total=None, score="")
        measured = nll.evaluate(
            loaded.params,
            loaded.config,
            packed,
            batch_size=batch_size,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    interval = measured.interval()
    result = {
        "nll": interval.mean,
        "nll_interval": [interval.low, interval.high],
        "nll_tokens": measured.num_tokens,
        "num_examples": len(measured.ids),
        "packing": packed.stats.to_json(),
    }
    console.print(
        f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}] nats per answer token, "
        f"{measured.num_tokens} tokens of {len(measured.ids)} examples",
        markup=False,
    )
    return settings, measured.records(), result


def _heldout(loaded: Loaded) -> Packed:
    assert loaded.tokenizer is not None
    data = load_data(
        DataConfig(source=DATA.value or "stdlib", num_heldout=NUM.value, seed=SEED.value)
    )
    if not data.heldout:
        raise InputError(f"{DATA.value} holds too few examples to hold any out: give more")
    examples = encode_records(data.heldout, loaded.tokenizer)
    return pack(examples, SEQ_LEN.value, loaded.tokenizer.pad_id)


# -- shared ----------------------------------------------------------------------------------------


def _folder() -> Path:
    assert OUT.value is not None
    return Path(OUT.value)


def _load_model() -> Loaded:
    assert MODEL.value is not None
    loaded = load_any(MODEL.value, "float32")
    if loaded.tokenizer is None:
        raise InputError(f"{MODEL.value} has no tokenizer, so it cannot be asked anything")
    return dataclasses.replace(loaded, params=jax.device_put(loaded.params))


def _describe(loaded: Loaded) -> None:
    config = loaded.config
    console.print(
        f"model: {config.num_layers} layers of width {config.d_model}, "
        f"{tree.num_params(loaded.params):,} parameters, "
        f"{tree.num_bytes(loaded.params) / 2**30:.2f} GiB in float32",
        markup=False,
    )


def _progress() -> Progress:
    columns = (
        *Progress.get_default_columns()[:3],
        TimeRemainingColumn(),
        TextColumn("{task.fields[score]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _require(value: object, name: str, what: str) -> None:
    if value is None:
        raise InputError(f"--{name} is missing: give {what}")


def _ks(num_samples: int | None) -> list[int]:
    try:
        ks = [int(text) for text in K.value]
    except ValueError:
        raise InputError(f"--k takes whole numbers, got {','.join(K.value)}") from None
    if not ks or min(ks) < 1 or (num_samples is not None and max(ks) > num_samples):
        raise InputError(
            f"--k={','.join(K.value)} must lie between 1 and --num_samples={num_samples}"
        )
    return ks


if __name__ == "__main__":
    cli.run(main)
