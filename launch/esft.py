"""ESFT: train the experts that a task uses, and only them (arXiv 2407.01906).

    python -m launch.esft --stage=score --model=MODEL --data=task.jsonl --out=SCORES
    python -m launch.esft --stage=select --scores=SCORES --score=token --threshold=0.2 \\
        --out=FILE.json
    python -m launch.esft --stage=train --config=configs/esft/task.py \\
        --config.model.source=MODEL --config.data.source=task.jsonl \\
        --config.method.experts=FILE.json --workdir=RUN
    python -m launch.esft --stage=attach --base=MODEL --delta=DELTA --out=TUNED

score   counts, per layer and expert, which share of the task's tokens choose it and its mean gate
        score. SCORES gets summary.json (the reference's layout), counts.npz (exact, also per
        conversation), stability.json and .png (from how many tokens on the ranking is stable) and,
        with --per_token, the reference's per-token files; --gradients adds a third signal.
select  chooses experts by their scores: per layer the smallest set whose scores reach --threshold,
        or --count best ones, or as many as another config has (--counts_from), or what fits in
        --byte_budget. --random_seed draws as many at random instead, the control. --scores is a
        folder with summary.json or per-token files, ours or the reference's, or such a file.
train   trains the chosen experts and nothing else, or one of the baselines in the same harness
        (--config.method.name=full, lora, frozen); configs/esft/base.py says what each key means.
        RUN gets delta/ (or model/), result.json and routing.json: what it did to the routing. All
        devices are used, split as --config.mesh.* says; several processes by --multihost, each of
        which keeps a copy of the model in its host's memory.
attach  puts a delta (a folder with expert_cfg.json and safetensors, ours or the reference's) into
        its base and writes the whole model; --remove takes it out of --model again, with the
        weights of --base; --extract makes a delta of --model, where it differs from --base only in
        --experts.
report  --scores=TASK=DIR,TASK=DIR: heat maps of relevance, overlap between tasks, experts per layer
        and, with --model, bytes; OUT/report.html. --group_sizes=1,2,4 asks, of the first task's
        per-token files, how many experts coarser groups would train.
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from launch import cli, multihost  # noqa: F401 (--multihost is a flag of --stage=train)
from moejax.core.errors import InputError

STAGES = ("score", "select", "train", "attach", "report")

CONFIG = config_flags.DEFINE_config_file("config", None, "train: a file of configs/esft/.")
WORKDIR = flags.DEFINE_string("workdir", None, "train: folder of the run; resumed if it is there.")
STAGE = flags.DEFINE_enum("stage", None, STAGES, "What to do.", required=True)
OUT = flags.DEFINE_string("out", None, "File or folder to make.")
MODEL = flags.DEFINE_string("model", None, "Model: folder, .gguf file or hub id.")
DATA = flags.DEFINE_string(
    "data", None, "score: stdlib, a .jsonl, .jsonl.gz or .parquet file, or a hub data set."
)
NUM_TOKENS = flags.DEFINE_integer(
    "num_tokens", 131072, "score: tokens to read, the paper's number; 0: all of the data."
)
SEQ_LEN = flags.DEFINE_integer("seq_len", 4096, "score: tokens per packed row.", lower_bound=2)
BATCH = flags.DEFINE_integer("batch_size", 1, "score: rows at a time.", lower_bound=1)
HELDOUT = flags.DEFINE_float(
    "heldout_share", 0.15, "score: share of the data that is not read, training's held-out part."
)
SEED = flags.DEFINE_integer("seed", 0, "score: of the order of the data.")
DTYPE = flags.DEFINE_string("dtype", "float32", "score: of the arithmetic.")
AVERAGE = flags.DEFINE_enum(
    "average", "pooled", ("pooled", "sequence"), "score: over all tokens, or over sequences' means."
)
PER_TOKEN = flags.DEFINE_bool("per_token", False, "score: write expert_weights_<layer>.txt too.")
GRADIENTS = flags.DEFINE_bool("gradients", False, "score: also by the size of gradients.")
GRADIENT_BATCHES = flags.DEFINE_integer("gradient_batches", 8, "score: batches for --gradients.")
SCORES = flags.DEFINE_string("scores", None, "select: folder or file of scores.")
SCORE = flags.DEFINE_enum(
    "score",
    "token",
    ("token", "gate", "gradient"),
    "select: token selection ratio, average gate score, or the gradient's size.",
)
THRESHOLD = flags.DEFINE_float("threshold", None, "select: sum of scores to reach, in (0, 1].")
DECIMALS = flags.DEFINE_integer(
    "round_decimals", 4, "select: decimals of the scores, as the reference's have; -1: all."
)
TOP_K = flags.DEFINE_integer("top_k", 6, "select: experts per token of per-token files.")
COUNT = flags.DEFINE_integer("count", None, "select: so many experts of each layer.")
COUNTS_FROM = flags.DEFINE_string(
    "counts_from", None, "select: as many experts of each layer as this config has."
)
BYTE_BUDGET = flags.DEFINE_string(
    "byte_budget", None, "select: what the chosen experts may take, as 2.57GB; needs --model."
)
RANDOM_SEED = flags.DEFINE_integer(
    "random_seed", None, "select: draw as many experts at random instead."
)
SHARED = flags.DEFINE_bool("shared_experts", False, "select: train the shared experts too.")
OTHERS = flags.DEFINE_bool("non_expert_modules", False, "select: train what is no expert too.")
BASE = flags.DEFINE_string("base", None, "attach: the model that the delta was trained from.")
DELTA = flags.DEFINE_string("delta", None, "attach: folder of a delta.")
REMOVE = flags.DEFINE_bool("remove", False, "attach: take --delta out of --model.")
EXTRACT = flags.DEFINE_bool("extract", False, "attach: make a delta of --model.")
EXPERTS = flags.DEFINE_string("experts", None, "Expert config: which experts (select makes one).")
FORMAT = flags.DEFINE_enum("format", None, ("hf", "orbax", "gguf"), "attach: of the whole model.")
GROUPS = flags.DEFINE_list("group_sizes", [], "report: experts per group, to simulate.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what is at --out.")


def main(argv) -> None:
    del argv
    # A stage's modules are imported when it runs: --help should not wait for jax.
    if STAGE.value == "score":
        from launch import esft_score

        esft_score.main(_named("out", "model", "data"))
    elif STAGE.value == "select":
        from launch import esft_select

        esft_select.main(_named("out", "scores"))
    elif STAGE.value == "train":
        from launch import esft_train

        esft_train.main(_named("config", "workdir"))
    elif STAGE.value == "attach":
        from launch import esft_attach

        esft_attach.main(_named("out", "base"))
    else:
        from launch import esft_report

        esft_report.main(_named("out", "scores"))


def _named(*names: str) -> dict:
    """All flags by name; InputError unless those named here are given."""
    values = {name: flags.FLAGS[name].value for name in flags.FLAGS if not name.startswith("_")}
    for name in names:
        if not values[name]:
            raise InputError(f"--stage={values['stage']} needs --{name}")
    return values


if __name__ == "__main__":
    cli.run(main)
