"""`launch.shadow --stage=bench`: speed under the masks that --stage=evaluate judges.

The same model, predictor file, block size, unit of heads and sparsities; RUN/bench.json, which
--stage=report puts beside perplexity. Rows of another predictor or interval that are there stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from launch.shadow_data import load_model
from launch.shadow_generate import predictor_folder, read_predictor
from launch.shadow_speed import (
    NUM_ROUNDS,
    NUM_TOKENS,
    Setup,
    check_interval,
    check_peer,
    measure,
    num_threads,
)
from moejax.io import atomic
from moejax.methods.shadow_decode import check_plan, lay_out
from moejax.methods.shadow_order import reordered
from moejax.methods.shadow_predictor import IN_STEP, hash_folder
from moejax.serve import sparse
from moejax.serve.prepare import prepare


def main(values: dict[str, Any]) -> None:
    """Times decoding, dense and at every sparsity of the config, and writes RUN/bench.json."""
    config = values["config"]
    model = load_model(config)
    if values["peer"]:
        check_peer(model.loaded.config)
    predictor = read_predictor(values, model)
    check_interval(values["refresh_every"])
    sparse.check_interval(predictor, values["refresh_every"])
    asked, variant = sparse.asked_of(predictor), predictor.info.variant
    sparsities = [float(s) for s in config.evaluate.sparsities]
    print(
        f"bench    {', '.join(f'{s:.0%}' for s in sparsities)} not computed, {NUM_ROUNDS} rounds "
        f"of {NUM_TOKENS} tokens, batch 1, float32, {num_threads()} threads"
    )
    check_plan(model.loaded.config, predictor.info.sizes)
    if values["dry_run"]:
        print("dry run: nothing timed, nothing written")
        return
    target = Path(values["workdir"]) / "bench.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    sizes = predictor.info.sizes
    params = reordered(model.loaded.params, model.loaded.config, predictor.order_LF)
    often = 1 if variant in IN_STEP else values["refresh_every"]
    setup = Setup(
        model.loaded.config.family,
        model.loaded.config,
        prepare(params),
        lay_out(params, model.loaded.config, sizes),
        sizes,
        jax.device_put(predictor.params) if asked is None else None,
        often,
        asked,
        variant == "token",
    )
    measured = measure(setup, sparsities, values["peer"])
    about = {"predictor": hash_folder(predictor_folder(values)), "refresh_every": often}
    about["decided"] = "in every layer" if asked is not None else _when(often, variant)
    rows: list[dict[str, Any]] = [speed.to_json() | about for speed in measured]
    for row in rows:
        theirs = row["against_transformers"]
        print(
            f"{row['sparsity']:.0%}      {row['tokens_per_s']:.1f} tokens/s, "
            f"{row['against_dense']:.2f}x our dense decoding (bytes allow {row['bound']:.2f}x)"
            + (f", {theirs:.2f}x transformers" if theirs else "")
        )
    title = f"decoding, batch 1, float32, {num_threads()} threads"
    before = atomic.read_json(target)["rows"] if target.exists() else []
    others = [row for row in before if any(row.get(name) != about[name] for name in about)]
    atomic.write_json(target, {"title": title, "rows": others + rows})
    print(f"written  {target}")


def _when(refresh_every: int, variant: str) -> str:
    if variant == "token":
        return "at every token"
    return f"every {refresh_every} tokens" if refresh_every else "by the prompt"
