"""Runs tasks of lm-evaluation-harness on a moejax model (pip install 'moejax[eval]').

  python -m launch.harness --model=MODEL --tasks=piqa,arc_easy --out=DIR [--shots=5] [--num=200]

MODEL is a model folder, a .gguf file or a hub id. --include_path names a folder of task files
(YAML) of your own. DIR gets results.json and the samples of each task.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import cli
from launch.evaluate_settings import console, environment, model_hash
from launch.mesh_text import parse_mesh
from moejax.core.errors import InputError
from moejax.evals.harness import HarnessConfig, harness_model
from moejax.evals.samples import write_samples
from moejax.io.atomic import write_json
from moejax.io.load import load_any
from moejax.io.sharded import on_mesh
from moejax.models.transformer import ForwardOptions

MODEL = flags.DEFINE_string("model", None, "Model folder, .gguf file or hub id.")
TASKS = flags.DEFINE_list("tasks", None, "Names of the harness's tasks.")
OUT = flags.DEFINE_string("out", None, "Folder for results.json and samples.")
SHOTS = flags.DEFINE_integer("shots", None, "Solved examples shown; default the task's own.")
NUM = flags.DEFINE_integer("num", None, "Most examples of each task.", lower_bound=1)
INCLUDE = flags.DEFINE_string("include_path", None, "Folder with task files of your own.")
BATCH = flags.DEFINE_integer("batch_size", 16, "Rows at a time.", lower_bound=1)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Type of weights, arithmetic and cache."
)
MESH = flags.DEFINE_string("mesh", None, "Devices to split over, as tensor=4 or fsdp=2,tensor=2.")
SEED = flags.DEFINE_integer("seed", 0, "Of sampled answers and of the harness.")
CHAT = flags.DEFINE_bool("apply_chat_template", False, "Ask in the model's chat template.")
UNSAFE = flags.DEFINE_bool(
    "confirm_run_unsafe_code", False, "Let the harness run generated code, WITHOUT our sandbox."
)


def main(argv: Sequence[str]) -> None:
    del argv
    for holder in (MODEL, TASKS, OUT):
        if not holder.value:
            raise InputError(f"--{holder.name} is missing (--help says what it takes)")
    if INCLUDE.value is not None and not Path(INCLUDE.value).is_dir():
        raise InputError(f"--include_path={INCLUDE.value} is no folder")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError("the harness needs lm-eval: pip install 'moejax[eval]'") from None
    manager = TaskManager(include_path=INCLUDE.value)
    names = TASKS.value or []
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise InputError(f"lm-eval knows no task {unknown[0]!r}: `lm_eval ls tasks` lists them")
    assert MODEL.value and TASKS.value and OUT.value
    place = on_mesh(parse_mesh(MESH.value)) if MESH.value and not cli.DRY_RUN.value else None
    loaded = load_any(MODEL.value, DTYPE.value, abstract=cli.DRY_RUN.value, place=place)
    if loaded.tokenizer is None:
        raise InputError(f"{MODEL.value} has no tokenizer, so it cannot be asked anything")
    if cli.DRY_RUN.value:
        console.print(f"{', '.join(TASKS.value)} on {MODEL.value}", markup=False)
        return
    began = time.perf_counter()
    options = ForwardOptions(compute_dtype=DTYPE.value)
    settings = HarnessConfig(BATCH.value, 128 * BATCH.value, seed=SEED.value, options=options)
    lm = harness_model(loaded.params, loaded.config, loaded.tokenizer, settings, MODEL.value)
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=TASKS.value,
        num_fewshot=SHOTS.value,
        limit=NUM.value,
        task_manager=manager,
        apply_chat_template=CHAT.value,
        confirm_run_unsafe_code=UNSAFE.value,
        random_seed=SEED.value,
    )
    samples = found.pop("samples", {})
    folder = Path(OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in samples.items():
        write_samples(folder / f"samples_{name}.jsonl", json.loads(json.dumps(rows, default=str)))
    result = {
        "model": MODEL.value,
        "model_xxh3": model_hash(MODEL.value),
        "results": found["results"],
        "versions": found.get("versions", {}),
        "n_samples": found.get("n-samples", {}),
        "wall_s": round(time.perf_counter() - began, 2),
    }
    whole = json.loads(json.dumps(result | environment(), default=str))
    write_json(folder / "results.json", whole)
    for name, metrics in found["results"].items():
        shown = ", ".join(
            f"{key.removesuffix(',none')} {value:.4f}"
            for key, value in metrics.items()
            if isinstance(value, float)
        )
        console.print(f"{name}: {shown}", markup=False)


if __name__ == "__main__":
    cli.run(main)
