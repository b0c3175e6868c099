"""What report.json holds, and the verdict on a difference.

    rows         one per model, in the order of MODELS; the keys are ROW
    differences  {"model", "minus", "nll": D, "pass_at_1": D or None}, model minus `minus` on the
                 same examples; D = {"mean", "low", "high", "verdict"}, made by `difference`
    curves       optional: {"sft_dense" | "moe" | "merge": [{"tokens": n, "loss": nats}, ...]},
                 tokens counted since the base model (merge goes on where moe ended)
    coefficients optional: {"lam": [L], "routed": [L][J]} of the learned merge; one list of layers
                 per matrix, {"gate": [L][J], ...}, where each has its own
    expert_load  optional: [L][J], tokens per routed expert over the whole MoE stage
    run          optional: what was run on what (settings, data, machine), any JSON object

nll is the mean over examples of nats per answer token, or over tokens: the run says which; an
interval is [low, high]. pass_at_1 is a share with its number of tasks, None where nothing was run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moejax.evals.bootstrap import Interval, verdict

MODELS = ("base", "sft_dense", "moe", "merged_uniform", "merged_learned", "shared_only")
ROW = (
    "model",
    "nll",
    "nll_interval",
    "nll_tokens",
    "pass_at_1",
    "pass_at_1_n",
    "pass_at_1_interval",
    "params",
    "active_params",
    "train_tokens",
    "train_flops",
    "wall_s",
)
LOWER_IS_BETTER = {"nll": True, "pass_at_1": False}
NO_GAIN = "no gain"
ROUNDING = 1e-9  # how far a bound may pass its mean: both are sums of floats

Report = Mapping[str, Any]


def difference(metric: str, mean: float, low: float, high: float) -> dict[str, Any]:
    """A paired difference with its verdict: "better", "worse", or "no gain" if it covers 0."""
    if not low - ROUNDING <= mean <= high + ROUNDING:
        raise ValueError(f"{metric}: {mean} lies outside its interval [{low}, {high}]")
    word = verdict(Interval(mean, low, high), lower_is_better=LOWER_IS_BETTER[metric])
    return {"mean": mean, "low": low, "high": high, "verdict": word}


def check(report: Report) -> None:
    """Raises ValueError naming the first thing that is missing or does not fit."""
    for key in ("rows", "differences"):
        if key not in report:
            raise ValueError(f"the report has no {key!r}")
    names = [row.get("model") for row in report["rows"]]
    for row in report["rows"]:
        missing = [key for key in ROW if key not in row]
        if missing:
            raise ValueError(f"row {row.get('model')!r} has no {', '.join(missing)}")
        for metric in LOWER_IS_BETTER:
            value, interval = row[metric], row[f"{metric}_interval"]
            if value is not None and not (
                interval[0] - ROUNDING <= value <= interval[1] + ROUNDING
            ):
                raise ValueError(f"row {row['model']!r}: {metric} {value} outside {interval}")
    if len(set(names)) != len(names):
        raise ValueError(f"a model has two rows: {names}")
    if len({row["nll_tokens"] for row in report["rows"]}) > 1:
        raise ValueError("the rows' nll are over different tokens, which does not compare")
    for entry in report["differences"]:
        for key in ("model", "minus"):
            if entry[key] not in names:
                raise ValueError(f"a difference names {entry[key]!r}, which has no row")
        for metric in LOWER_IS_BETTER:
            given = entry[metric]
            if given is not None and given != difference(
                metric, given["mean"], given["low"], given["high"]
            ):
                raise ValueError(f"{entry['model']} - {entry['minus']}: {metric} verdict is wrong")
