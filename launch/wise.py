"""Mixes checkpoints of one run in weight space: WiSE-FT, and the means it is compared with.

    python -m launch.wise --early=runs/sft/early --late=runs/sft/model --delta=0.5 --out=runs/wise
    python -m launch.wise --early=A --late=B --deltas='**/attn/**=0.2,embed/**=0' --out=C
    python -m launch.wise --method=mean --models=A,B,C --out=soup
    python -m launch.wise --stage=sweep --early=A,B --late=C --task=gsm8k --out=runs/sweep
    python -m launch.wise --stage=soup --models=A,B,C --task=gsm8k --out=runs/soup

wise   w = delta * early + (1 - delta) * late: delta is the share of the EARLY checkpoint, 0 gives
       the late model's bytes, 1 the early one's (the method of 2021 counts the other way)
slerp  the same along the arc between the two, tensor by tensor
mean   the equal mean of --models: a uniform soup, or LAWA over checkpoints of one run
ema    their exponential moving average, oldest first, with --decay
task   --base plus --scale times the sum of (model - base)
ties   --base plus --scale times the mean of trimmed, sign-elected task vectors, of --density
dare   --base plus --scale times the sum of randomly thinned task vectors, of --density

--stage=sweep mixes in memory, one program for every delta, samples and grades: which early
checkpoint and delta are best on validation problems, and what they are worth on others, beside
other ways to decode; samples/, table.csv, sweep.json and plots/, resumable.

--stage=soup asks the task of every one of --models and makes a greedy soup: best first, each joins
the mean if that is then no worse by --criterion. OUT/model is the mean, soup.json says of whom.

Checkpoints of a LoRA run are written with A B added to the weights, so what is mixed is the change
A B itself, and not the factors, whose mixture is another function.

Weights of a mixture go from file to file in parts of a few megabytes (slerp, ties, dare: tensor by
tensor); a folder of our own format, as a source or as the target, goes through memory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from absl import flags

from launch import cli, wise_soup, wise_sweep
from launch.mixing import Plan, check_relatives, input_hashes, mixed_model
from launch.progress import bars
from moejax.core import tree
from moejax.core.errors import InputError
from moejax.io import atomic, lineage
from moejax.io.hf import has_class
from moejax.io.load import FORMATS, Loaded, load_any, save_any
from moejax.methods.interpolate import Deltas

METHODS = ("wise", "slerp", "mean", "ema", "task", "ties", "dare")
_ENDS, _BASED = ("wise", "slerp"), ("task", "ties", "dare")

STAGE = flags.DEFINE_enum("stage", "mix", ["mix", "sweep", "soup"],
                          "Write a mixture, measure many, or find and write a soup.")
METHOD = flags.DEFINE_enum("method", "wise", METHODS, "How the models are mixed.")
EARLY = flags.DEFINE_string(
    "early", None, "Early checkpoint: folder, .gguf file or hub id; of a sweep several, by commas."
)
LATE = flags.DEFINE_string("late", None, "Late checkpoint of the same run.")
MODELS = flags.DEFINE_list(
    "models", [], "Models, oldest first (mean, ema, task, ties, dare; of a soup in any order)."
)
BASE = flags.DEFINE_string("base", None, "What the models were tuned from (task, ties, dare).")
OUT = flags.DEFINE_string("out", None, "Folder to make.", required=True)
DELTA = flags.DEFINE_float("delta", 0.5, "Share of the early checkpoint, 0 to 1 (wise, slerp).")
DELTAS = flags.DEFINE_list("deltas", [], "PATTERN=DELTA over parameter paths; the first that fits.")
EXCLUDE = flags.DEFINE_list("exclude", [], "Patterns of paths that keep the late model's weights.")
LAYER_DELTAS = flags.DEFINE_list("layer_deltas", [], "Anchors, first layer to last: 0.2,0.8.")
EXPERT_DELTAS = flags.DEFINE_list("expert_deltas", [], "One delta per expert of an MoE model.")
EXTRAPOLATE = flags.DEFINE_bool("allow_extrapolation", False, "Allow deltas outside [0, 1].")
UNRELATED = flags.DEFINE_bool("allow_unrelated", False, "Mix models of different lineages.")
DECAY = flags.DEFINE_float("decay", 0.9, "Of ema.")
SCALE = flags.DEFINE_float("scale", 1.0, "Of task, ties and dare.")
DENSITY = flags.DEFINE_float("density", 0.2, "Share of entries that stay (ties, dare).")
SEED = flags.DEFINE_integer("seed", 0, "Of dare's draws, and of a sweep's samples and split.")
FORMAT = flags.DEFINE_enum("format", None, FORMATS, "Default: hf where transformers has a class.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a model folder at the target.")


def main(argv) -> None:
    del argv
    if STAGE.value == "sweep":
        early = [name for name in (EARLY.value or "").split(",") if name]
        if not early or LATE.value is None:
            raise InputError("--stage=sweep needs --early (one or several) and --late")
        wise_sweep.sweep_stage(early, LATE.value, OUT.value, SEED.value)
        return
    if STAGE.value == "soup":
        models = list(MODELS.value)
        if len(models) < 2 or any((EARLY.value, LATE.value, BASE.value)):
            raise InputError("--stage=soup needs at least two --models, and no other model")
        target = f"{OUT.value}/model"
        atomic.check_target(target, OVERWRITE.value)
        members = wise_soup.soup_stage(models, OUT.value, SEED.value, UNRELATED.value)
        if members:
            _write(members, Plan("mean"), target)
        return
    plan = Plan(METHOD.value, _deltas(), DECAY.value, SCALE.value, DENSITY.value, SEED.value)
    _write(_names(), plan, OUT.value)


def _write(names: Sequence[str], plan: Plan, out: str) -> None:
    """Mixes models into a folder."""
    started = time.perf_counter()
    atomic.check_target(out, OVERWRITE.value)
    models = [load_any(name, abstract=True) for name in names]
    for note in check_relatives(models, names, UNRELATED.value):
        print(f"note     {note}")
    late = models[-1]
    format = FORMAT.value or ("hf" if has_class(late.config) else "orbax")
    _show(names, late, format, plan, out)
    whole = any(model.tensors is None for model in models)
    mixed = mixed_model(models, names, plan, whole=False) if not whole else None
    atomic.require_disk(out, tree.num_bytes(late.params))
    if cli.DRY_RUN.value:
        print("dry run: nothing written")
        return
    with ThreadPoolExecutor(len(names)) as pool, bars() as (_, writing):
        inputs = input_hashes(models, names, pool, whole=whole)
        if mixed is None:
            mixed = mixed_model([load_any(name) for name in names], names, plan, whole=True)
        save_any(
            mixed,
            out,
            format,
            overwrite=OVERWRITE.value,
            progress=writing,
            operations=lambda: _operations(late, plan, inputs()),
        )
    print(f"written  {out} in {time.perf_counter() - started:.1f} s", flush=True)


def _names() -> list[str]:
    """The models to mix, the one whose config and tokenizer are kept last."""
    method, models = METHOD.value, list(MODELS.value)
    if method in _ENDS:
        if EARLY.value is None or LATE.value is None or models or BASE.value:
            raise InputError(f"--method={method} mixes two models: name --early and --late")
        return [EARLY.value, LATE.value]
    if EARLY.value is not None or LATE.value is not None:
        raise InputError(f"--method={method} takes --models, not --early and --late")
    if method in _BASED:
        if BASE.value is None or not models:
            raise InputError(f"--method={method} needs --base and at least one of --models")
        return [BASE.value, *models]
    if BASE.value is not None or len(models) < 2:
        raise InputError(f"--method={method} needs at least two --models, and no --base")
    return models


def _deltas() -> Deltas:
    patterns = [(pattern, 0.0) for pattern in EXCLUDE.value]
    for item in DELTAS.value:
        pattern, equals, value = item.rpartition("=")
        if not equals:
            raise InputError(f"--deltas takes PATTERN=DELTA, got {item!r}")
        patterns.append((pattern, _number(value, "--deltas")))
    return Deltas(
        DELTA.value,
        tuple(patterns),
        tuple(_number(value, "--expert_deltas") for value in EXPERT_DELTAS.value),
        tuple(_number(value, "--layer_deltas") for value in LAYER_DELTAS.value),
        EXTRAPOLATE.value,
    )


def _number(text: str, flag: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{flag}: {text!r} is not a number") from None


def _show(names: Sequence[str], late: Loaded, format: str, plan: Plan, out: str) -> None:
    what = f"delta {DELTA.value:g} of the early one" if plan.method in _ENDS else plan.method
    print(f"mix      {', '.join(names)}: {what}")
    print(
        f"write    {out} as {format}, {tree.num_params(late.params):,} parameters, "
        f"{tree.num_bytes(late.params) / 1e9:.3f} GB",
        flush=True,
    )


def _operations(late: Loaded, plan: Plan, inputs: list[dict[str, str]]) -> lineage.Lineage:
    args: dict[str, Any] = plan.args()
    return lineage.append(late.lineage, "interpolate", inputs, args)


if __name__ == "__main__":
    cli.run(main, freed="parts")
