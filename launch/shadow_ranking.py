"""Do predictors rank units well on what is judged? Their scores beside the true ones, row by row.

Perplexity and accuracy say what masks cost; this says whether a predictor that loses there failed
to predict, or predicted well what does not help.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from launch.shadow_arms import Decider, summed
from moejax.evals import masked
from moejax.io import atomic
from moejax.methods import shadow_metrics
from moejax.methods.shadow_mask import Mask, num_kept

PREDICTORS = ("predicted", "predicted_per_layer", "dejavu", "dejavu_equal")
FILE = "scores_{:05d}.npz"
PARTS = ("heads", "blocks")


def write(
    path: Path,
    decider: Decider,
    batch: masked.Batch,
    read: masked.Read,
    oracle: Mask,
    gold: Mapping[int, int],
) -> None:
    """Scores of a batch's rows, of a question those of its right answer: [rows, L, units] each."""
    first = decider.model.sizes.first
    mine = [at for at, row in enumerate(batch.rows) if gold.get(row, row) == row]
    truth = Mask(oracle.heads, summed(oracle.blocks, decider.model.sizes))
    found = {"truth": truth, "static": decider.scores("static", batch, read)}
    found |= {name: decider.scores(name, batch, read) for name in PREDICTORS}
    arrays = {
        f"{name}/{part}": np.asarray(getattr(scores, part))[mine, first:].astype(np.float32)
        for name, scores in found.items()
        for part in PARTS
    }
    atomic.write_npz(path, arrays)


def rows(workdir: Path) -> Iterator[dict[str, Any]]:
    """Per set and predictor: means over its rows and over layers that are pruned.

    As `shadow_metrics.held_out`, the better half of a layer's units for the overlap.
    """
    for folder in sorted((workdir / "evaluation").glob("*")):
        found: dict[str, list[np.ndarray]] = {}
        for path in sorted(folder.glob(FILE.format(0).replace("00000", "*"))):
            for name, array in atomic.read_npz(path).items():
                found.setdefault(name, []).append(array)
        whole = {name: np.concatenate(parts) for name, parts in found.items()}
        for name in PREDICTORS if whole else ():
            row: dict[str, Any] = {"set": folder.name, "predictor": name}
            row["rows"] = len(whole["truth/heads"])
            for part in PARTS:
                truth, static = whole[f"truth/{part}"], whole[f"static/{part}"][0]
                keep = num_kept(truth.shape[-1], 0.5)
                table = shadow_metrics.held_out(whole[f"{name}/{part}"], truth, static, keep)
                row |= {f"{part} {key}": float(v.mean()) for key, v in table.items()}
            yield row
