"""Numbers of `launch.shadow --stage=report`: every arm, paired intervals, causes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moejax.evals import bootstrap

RIVALS = (
    *("static", "dejavu", "dejavu_equal", "random", "oracle", "predicted_per_layer"),
    *("dejavu_token", "dejavu_token_single", "dejavu_equal_token"),
    *("predicted_each", "predicted_token"),
)
AT_TOKENS = (
    *("predicted", "predicted_each", "predicted_now", "predicted_late"),
    *("dejavu_token", "dejavu_equal_token"),
)
OF = {"predicted": RIVALS, "predicted_token": (*AT_TOKENS, "static", "oracle", "random")}
# (variant of the predictor, after how many tokens it is asked anew; 0: never) -> what was judged.
JUDGED = {
    ("unified", 0): "predicted",
    ("per_layer_normalised", 0): "predicted_per_layer",
    ("unified", 1): "predicted_each",
    ("token", 1): "predicted_token",
    ("dejavu", 1): "dejavu_token",
    ("dejavu_equal", 1): "dejavu_equal_token",
}
Records = dict[tuple[str, str], dict[str, Any]]  # (set, arm's name) -> its record


def arm_name(method: str, place: str, sparsity: float, budget: str) -> str:
    """As `launch.shadow_arms.Arm.name`."""
    return f"{method}-{place}-{sparsity:g}-{budget}"


def value_of(record: dict[str, Any]) -> float:
    """Perplexity of texts, accuracy of questions."""
    if "passed" in record:
        return float(np.mean(record["passed"]))
    return float(np.exp(np.sum(record["nats"]) / np.sum(record["counts"])))


def arm_rows(records: Records) -> list[dict[str, Any]]:
    """One row per set and arm: its figure, and its difference to dense with a 95 % interval."""
    rows = []
    for (name, _), record in records.items():
        dense = records.get((name, "dense-both-0-local"))
        row = {"set": name} | {n: record[n] for n in ("method", "place", "sparsity", "budget")}
        row |= {n: record[n] for n in ("kept_heads", "kept_neurons", "judged", "total")}
        row["value"] = value_of(record)
        row["unit"] = "accuracy" if "passed" in record else "perplexity"
        if "passed" in record:
            row["gold_margin"] = float(np.mean(record["gold_margin"]))
        if dense is not None and record["method"] != "dense":
            row["minus_dense"] = difference(record, dense)
        rows.append(row)
    return rows


def difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """a minus b on the same rows: nats per token, or gold margin in nats and accuracy."""
    if "passed" not in a:
        found = bootstrap.paired_ratio(a["nats"], b["nats"], a["counts"])
        return {"nats_per_token": _interval(found, lower_is_better=True)}
    margin = bootstrap.paired_mean(a["gold_margin"], b["gold_margin"])
    accuracy = bootstrap.paired_share(a["passed"], b["passed"])
    return {"gold_margin": _interval(margin), "accuracy": _interval(accuracy)}


def _interval(found: bootstrap.Interval, lower_is_better: bool = False) -> dict[str, Any]:
    said = bootstrap.verdict(found, lower_is_better=lower_is_better)
    return {"mean": found.mean, "low": found.low, "high": found.high, "verdict": said}


def paired_rows(records: Records) -> list[dict[str, Any]]:
    """Predicted minus every rival, at each set, place, sparsity and budget that has both.

    By the prompt, and at every token ("predicted_token") minus what decides there too.
    """
    rows = []
    for (name, _), record in records.items():
        for rival in OF.get(record["method"], ()):
            at = record["place"], record["sparsity"], record["budget"]
            other = records.get((name, arm_name(rival, *at)))
            if other is not None:
                row = {"set": name, "method": record["method"], "minus": rival}
                row |= {n: record[n] for n in ("place", "sparsity", "budget")}
                rows.append(row | difference(record, other))
    return rows


def cause_rows(records: Records, heldout: dict[str, Any]) -> list[dict[str, Any]]:
    """What separates the causes where the predictor does not win, in nats per token of texts.

    room      oracle minus static: what this input's true scores would gain. Near 0, nothing is to
              be predicted, whatever the predictor.
    taken     the share of that room that predicted masks gain over static ones.
    blocks    static (and oracle) masks of single neurons minus those of blocks: what contiguity
              costs.
    gain      held-out correlation of what is a text's own in prediction and truth: near 0, the
              prompt's vector did not say it.
    """

    def nats(method: str, place: str, sparsity: float) -> float | None:
        record = records.get(("wikitext", f"{method}-{place}-{sparsity:g}-local"))
        return None if record is None else float(np.sum(record["nats"]) / np.sum(record["counts"]))

    rows = []
    keys = {
        (r["place"], r["sparsity"])
        for (n, _), r in records.items()
        if n == "wikitext" and r["method"] == "oracle"
    }
    for place, sparsity in sorted(keys):
        found: dict[str, Any] = {
            m: nats(m, place, sparsity) for m in ("static", "oracle", "predicted")
        }
        singles = {m: nats(f"{m}_single", place, sparsity) for m in ("static", "oracle")}
        if None in found.values():
            continue
        room = found["oracle"] - found["static"]
        row: dict[str, Any] = {"place": place, "sparsity": sparsity, "room": room}
        row["taken"] = (found["predicted"] - found["static"]) / room if room else 0.0
        for name, value in singles.items():
            row[f"blocks_{name}"] = None if value is None else value - found[name]
        part = {"heads": ("heads",), "neurons": ("blocks",)}.get(place, ("heads", "blocks"))
        row["gain"] = {p: heldout.get("unified", {}).get(p, {}).get("gain") for p in part}
        rows.append(row)
    return rows


def quality_and_speed(
    speed: list[dict[str, Any]], records: Records, predictors: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Rows of RUN/bench.json with what the same masks of the same sparsity cost in quality.

    predictors: hash of each of the run's own -> its variant or name. A row that was timed with
    another, or that decides anew as often as no one judged, has no figures of quality.
    """
    found = []
    for row in speed:
        mine = {k: v for k, v in row.items() if not k.endswith("_rounds")}
        variant = predictors.get(row.get("predictor", ""), "")
        method = JUDGED.get((variant, row["refresh_every"]))
        if method is not None:
            mine["method"] = method
            for name in dict.fromkeys(name for name, _ in records):
                arm = records.get((name, arm_name(method, "both", row["sparsity"], "local")))
                dense = records.get((name, "dense-both-0-local"))
                if arm is not None and dense is not None:
                    unit = "accuracy" if "passed" in arm else "perplexity"
                    mine[f"{name} {unit}"] = value_of(arm)
                    mine[f"{name} {unit}, dense"] = value_of(dense)
        found.append(mine)
    return found


def lines(records: Records, name: str, place: str, field: str) -> dict[str, list]:
    """Of local budgets: method -> (sparsity, value) in order, for a plot."""
    found: dict[str, list] = {}
    for (where, _), record in records.items():
        r = record
        mine = r["place"] == place or (
            place == "both" and r["method"] in ("griffin_single", "cats")
        )
        if where != name or r["budget"] != "local" or not mine or r["method"] == "dense":
            continue
        value = value_of(r) if field == "value" else float(np.mean(r["gold_margin"]))
        found.setdefault(r["method"], []).append((r["sparsity"], value))
    at_one_sparsity = tuple(m for m in found if m.startswith("static_")) + ("oracle_single",)
    return {m: sorted(points) for m, points in found.items() if m not in at_one_sparsity}


def shown(cell: Any) -> str:
    """A cell of a table."""
    if cell is None:
        return ""
    if isinstance(cell, dict) and "low" in cell:
        return f"{cell['mean']:+.4f} [{cell['low']:+.4f}, {cell['high']:+.4f}]"
    if isinstance(cell, dict):
        return ", ".join(f"{k} {shown(v)}" for k, v in cell.items())
    return f"{cell:.4f}" if isinstance(cell, float) else str(cell)


def verdicts(rows: Iterable[dict[str, Any]], field: str) -> dict[str, int]:
    """How often each verdict was reached."""
    found: dict[str, int] = {}
    for row in rows:
        if field in row:
            said = row[field]["verdict"]
            found[said] = found.get(said, 0) + 1
    return found
