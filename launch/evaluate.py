"""Measures a model, or grades samples made elsewhere.

  python -m launch.evaluate --samples=FILE.jsonl --task=humaneval [--data=FILE] [--k=1,10,100]
  python -m launch.evaluate --model=MODEL --task=functions --out=DIR --allow_code_execution
  python -m launch.evaluate --model=MODEL --task=piqa [--shots=5] --out=DIR
  python -m launch.evaluate --model=MODEL --task=perplexity --data=FILE.txt --out=DIR
  python -m launch.evaluate --model=MODEL --task=own --data=FILE.jsonl --grader=number --out=DIR
  python -m launch.evaluate --model=MODEL --task=nll --data=stdlib --num=64 --out=DIR

MODEL is a model folder, a .gguf file or a hub id. --data is the task's set: a .jsonl, .jsonl.gz or
.parquet file, or a hub name ("owner/name#split"); without it the hub is asked. A file of samples
has one JSON object a line: "task_id" (or "id") and "completion", which continues the problem or is
a whole reply, or "solution", a whole program.

DIR (for samples by default a folder beside them) gets samples.jsonl, one record per answer, and
result.json. Run again with the same flags, it goes on where it stopped. Programs run in a sandbox
(moejax/evals/sandbox.py says what it holds back): those of a model only with
--allow_code_execution, those of a file unless --noallow_code_execution.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import cli, evaluate_likelihood, evaluate_nll, evaluate_tasks
from launch.evaluate_settings import Settings, write_run
from moejax.core.errors import InputError
from moejax.evals.sandbox import Limits
from moejax.evals.tasks import TASKS
from moejax.evals.tasks.choice import CHOICE_TASKS
from moejax.evals.tasks.own import GRADERS

MODEL = flags.DEFINE_string("model", None, "Model folder, .gguf file or hub id.")
NAMES = [*TASKS, "own", *CHOICE_TASKS, "perplexity", "nll"]
TASK = flags.DEFINE_enum("task", None, NAMES, "What to measure.")
OUT = flags.DEFINE_string("out", None, "Folder for samples.jsonl and result.json.")
SAMPLES = flags.DEFINE_string("samples", None, "Grade this JSONL file; no model is loaded.")
DATA = flags.DEFINE_string(
    "data", None, "The task's problems, as above. nll: stdlib (default), a file or a hub data set."
)
NUM = flags.DEFINE_integer(
    "num", None, "Most problems or held-out examples; default all (nll: 64).", lower_bound=1
)
FORM = flags.DEFINE_string(
    "form", None, "Prompt form; default what the model's prompt_forms.json says, or the first."
)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Answers per problem.", lower_bound=1)
K = flags.DEFINE_list(
    "k", None, "Pass@k is reported for these; default those of 1, 10, 100 that samples allow."
)
NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Per answer.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", lower_bound=0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "Nucleus of the sampling.", 0.0, 1.0)
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling and of the order of the data.")
BATCH = flags.DEFINE_integer("batch_size", None, "Rows at a time; default 32, for nll 4.")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Type of weights, arithmetic and cache."
)
MESH = flags.DEFINE_string("mesh", None, "Devices to split over, as tensor=4 or fsdp=2,tensor=2.")
SEQ_LEN = flags.DEFINE_integer("seq_len", 512, "Tokens per packed row (nll).", lower_bound=2)
SHOTS = flags.DEFINE_integer("shots", 0, "Solved problems shown first.", lower_bound=0)
SHOTS_DATA = flags.DEFINE_string(
    "shots_data", None, "Where they are drawn from; default the set's train split or its others."
)
PACKAGES = flags.DEFINE_list(
    "package_folders",
    [],
    "Folders of packages that tests load: node_modules, perl5, jars.",
)
WALL_S = flags.DEFINE_float(
    "wall_s", 15.0, "Seconds one program may run; waiting counts.", lower_bound=0.1
)
CPU_S = flags.DEFINE_integer("cpu_s", 5, "Seconds it may compute.", lower_bound=1)
GRADER = flags.DEFINE_enum("grader", None, list(GRADERS), "Of --task=own: a file of your own.")
VERSUS = flags.DEFINE_string(
    "versus", None, "Folder of another model's run of the same task: the paired difference."
)
OVERLAP = flags.DEFINE_string(
    "overlap", None, "What launch.decontaminate wrote: goes into every record."
)
PARTIAL = flags.DEFINE_bool("partial", False, "Score a file of samples that leaves problems out.")
EXECUTE = flags.DEFINE_bool(
    "allow_code_execution", None, "Run programs in the sandbox; default only those of --samples."
)


def main(argv: Sequence[str]) -> None:
    del argv
    settings = _settings()
    began = time.perf_counter()
    if settings.task in TASKS or settings.task == "own":
        outcome = evaluate_tasks.evaluate(settings)
    elif settings.task == "nll":
        outcome = evaluate_nll.evaluate(settings)
    else:
        outcome = evaluate_likelihood.evaluate(settings)
    if outcome is not None:
        write_run(settings, outcome, began)


def _settings() -> Settings:
    """The flags, checked."""
    if TASK.value is None:
        raise InputError(f"--task is missing: give one of {', '.join(NAMES)}")
    samples = None if SAMPLES.value is None else Path(SAMPLES.value)
    if samples is None and OUT.value is None:
        raise InputError("--out is missing: give a folder for the results")
    if samples is None and MODEL.value is None:
        raise InputError("--model is missing: give a model folder, a .gguf file or a hub id")
    graded = TASK.value in TASKS or TASK.value == "own"
    if samples is not None and (not graded or MODEL.value is not None):
        raise InputError(f"--samples grades a file with --task={'|'.join(TASKS)}, without --model")
    beside = None if samples is None else samples.with_name(f"{samples.stem}.{TASK.value}")
    out = beside if OUT.value is None else Path(OUT.value)
    assert out is not None
    if (TASK.value == "own") != (GRADER.value is not None):
        raise InputError(f"--task=own and --grader={'|'.join(GRADERS)} go together")
    if VERSUS.value is not None and not (Path(VERSUS.value) / "samples.jsonl").is_file():
        raise InputError(f"--versus={VERSUS.value} holds no samples.jsonl of a finished run")
    lost = [folder for folder in PACKAGES.value if not Path(folder).is_dir()]
    if lost:
        raise InputError(f"--package_folders: {lost[0]} is no folder")
    return Settings(
        task=TASK.value,
        model=MODEL.value,
        out=out,
        samples=samples,
        data=DATA.value,
        num=NUM.value,
        form=FORM.value,
        num_samples=NUM_SAMPLES.value,
        ks=_ks(None if samples else NUM_SAMPLES.value),
        max_new_tokens=NEW_TOKENS.value,
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        seed=SEED.value,
        batch_size=BATCH.value,
        seq_len=SEQ_LEN.value,
        shots=SHOTS.value,
        shots_data=SHOTS_DATA.value,
        package_folders=tuple(str(Path(folder).absolute()) for folder in PACKAGES.value),
        limits=Limits(wall_s=WALL_S.value, cpu_s=CPU_S.value),
        partial=PARTIAL.value,
        overlap=OVERLAP.value,
        grader=GRADER.value,
        versus=None if VERSUS.value is None else Path(VERSUS.value),
        execute=samples is not None if EXECUTE.value is None else EXECUTE.value,
        dry_run=cli.DRY_RUN.value,
        dtype=DTYPE.value,
        mesh=MESH.value,
    )


def _ks(num_samples: int | None) -> tuple[int, ...] | None:
    if K.value is None:
        return None
    try:
        ks = tuple(int(text) for text in K.value)
    except ValueError:
        raise InputError(f"--k takes whole numbers, got {','.join(K.value)}") from None
    if not ks or min(ks) < 1 or (num_samples is not None and max(ks) > num_samples):
        raise InputError(
            f"--k={','.join(K.value)} must lie between 1 and --num_samples={num_samples}"
        )
    return ks


if __name__ == "__main__":
    cli.run(main)
