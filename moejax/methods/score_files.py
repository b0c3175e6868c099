"""Relevance scores on disk, in the reference's layouts (github.com/deepseek-ai/ESFT).

summary.json               {"token_scores": {"<layer>": {"<expert>": score}}, "gate_scores": ...}
expert_weights_<layer>.txt one line per conversation: T * K expert ids, a double tab, T * K gate
                           scores; the K of a token stand together
rank_<r>/expert_weights_<layer>.txt    the same, from several processes
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moejax.core.errors import InputError
from moejax.io import atomic
from moejax.methods.expert_selection import SCORES, ExpertScores

SUMMARY = "summary.json"
_TOKENS = re.compile(r"(?:.*[_.-])?expert_weights_(\d+)\.txt")
# Sums of token scores that were rounded to 4 decimals lie within this of 1 for 256 experts.
_SUM_ERROR = 0.02


def read_scores(path: str | os.PathLike[str], top_k: int = 6) -> tuple[ExpertScores, str]:
    """Reads scores from a folder or file of one task, and says in words what they were read from.

    Args:
      path: a folder with summary.json or per-token files (below rank_<r>/ too), or such a file.
      top_k: experts per token of per-token files, which do not say it; the reference has 6. The
        token selection ratio does not depend on it.

    A summary whose token scores do not sum to one per layer (the reference's later script divides
    over layers) is passed over if the per-token files are there. Errors: InputError for what is
    missing, empty, NaN, negative, or differs from layer to layer.
    """
    path = Path(path)
    if path.is_file():
        if _TOKENS.fullmatch(path.name):
            return from_token_files([path], top_k), str(path)
        return _from_summary(path), str(path)
    if not path.is_dir():
        raise InputError(f"{path} is missing: name a folder with {SUMMARY} or per-token files")
    texts = _texts(path)
    summary = _summary_of(path)
    if summary is not None:
        scores = _from_summary(summary, check_sums=not texts)
        if _sums_to_one(scores):
            return scores, str(summary)
        note = f"{len(texts)} per-token files ({SUMMARY}'s token scores do not sum to one)"
        return from_token_files(texts, top_k), note
    if texts:
        return from_token_files(texts, top_k), f"{len(texts)} per-token files of {path}"
    below = sorted(p.name for p in path.iterdir() if p.is_dir())
    hint = f"; did you mean a folder in it ({', '.join(below[:5])})?" if below else ""
    raise InputError(f"{path} has neither {SUMMARY} nor expert_weights_<layer>.txt{hint}")


def from_token_files(paths: Iterable[Path], top_k: int) -> ExpertScores:
    """Both scores, pooled over all tokens, from per-token files; several of a layer add up."""
    counts: dict[int, np.ndarray] = {}
    sums: dict[int, np.ndarray] = {}
    for path in paths:
        layer = int(_TOKENS.fullmatch(path.name).group(1))  # type: ignore[union-attr]
        ids, gates = _read_tokens(path, top_k)
        counts[layer] = _add(counts.get(layer), np.bincount(ids).astype(np.float64))
        sums[layer] = _add(sums.get(layer), np.bincount(ids, gates))
    num_experts = max(len(c) for c in counts.values())
    layers = tuple(sorted(counts))
    pairs = {layer: int(counts[layer].sum()) for layer in layers}
    if len(set(pairs.values())) > 1:
        raise InputError(
            f"layers {layers[0]} to {layers[-1]} do not hold equally many tokens "
            f"({min(pairs.values())} to {max(pairs.values())} choices): a file is cut or missing"
        )
    whole = np.zeros((2, len(layers), num_experts))
    for i, layer in enumerate(layers):
        whole[0, i, : len(counts[layer])] = counts[layer] / pairs[layer]
        whole[1, i, : len(sums[layer])] = sums[layer] / (pairs[layer] / top_k)
    return ExpertScores(layers, tuple(range(num_experts)), {"token": whole[0], "gate": whole[1]})


def token_choices(
    path: str | os.PathLike[str], top_k: int = 6
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Layer -> every token's (ids [N, K], gate scores [N, K]), of a folder of per-token files."""
    path = Path(path)
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for file in _texts(path):
        layer = int(_TOKENS.fullmatch(file.name).group(1))  # type: ignore[union-attr]
        ids, gates = (part.reshape(-1, top_k) for part in _read_tokens(file, top_k))
        if layer in found:
            ids, gates = (
                np.concatenate([found[layer][0], ids]),
                np.concatenate([found[layer][1], gates]),
            )
        found[layer] = ids, gates
    if not found:
        raise InputError(f"{path} has no expert_weights_<layer>.txt: score with --per_token")
    return dict(sorted(found.items()))


def summary_json(scores: ExpertScores, decimals: int | None = 4) -> dict[str, Any]:
    """The reference's summary.json. Inverse: `scores_of`."""
    scores = scores.rounded(decimals)
    return {
        f"{name}_scores": {
            str(layer): {str(e): float(v) for e, v in zip(scores.experts, row, strict=True)}
            for layer, row in zip(scores.layers, values, strict=True)
        }
        for name, values in scores.values.items()
    }


def scores_of(fields: Any, where: str) -> ExpertScores:
    """Reads summary.json's fields. Inverse: `summary_json`."""
    kinds = [n for n in SCORES if isinstance(fields, Mapping) and fields.get(f"{n}_scores")]
    if not kinds:
        raise InputError(f"{where} has no token_scores or gate_scores: it is empty or no summary")
    tables = {name: fields[f"{name}_scores"] for name in kinds}
    first = tables[kinds[0]]
    if not isinstance(first, Mapping) or not all(isinstance(r, Mapping) for r in first.values()):
        raise InputError(f"{where}: {kinds[0]}_scores is not layers of experts of scores")
    layers = list(first)
    experts = list(first[layers[0]])
    for what, names in (("layer", layers), ("expert", experts)):
        wrong = [n for n in names if not n.isdecimal()]
        if wrong:
            raise InputError(f"{where}: {what} {wrong[0]!r} is not a number")
    experts.sort(key=int)
    values = {
        name: _table(table, layers, experts, f"{where}: {name}_scores")
        for name, table in tables.items()
    }
    return ExpertScores(tuple(map(int, layers)), tuple(map(int, experts)), values)


def token_line(experts_TK: np.ndarray, gates_TK: np.ndarray) -> str:
    """One conversation's line of a per-token file, gates with 4 decimals as the reference has."""
    ids = "\t".join(map(str, experts_TK.reshape(-1).tolist()))
    gates = "\t".join(str(round(float(g), 4)) for g in gates_TK.reshape(-1))
    return f"{ids}\t\t{gates}\n"


def _summary_of(folder: Path) -> Path | None:
    """summary.json, or the only file called so with something before it."""
    if (folder / SUMMARY).exists():
        return folder / SUMMARY
    found = sorted(folder.glob(f"*[_.-]{SUMMARY}"))
    return found[0] if len(found) == 1 else None


def _texts(folder: Path) -> list[Path]:
    """A folder's per-token files, those below rank_<r>/ too."""
    found = [*folder.glob("*.txt"), *folder.glob("*/*.txt")]
    return sorted(path for path in found if _is_text(folder, path))


def _is_text(folder: Path, path: Path) -> bool:
    inside = path.parent == folder or path.parent.name.startswith("rank")
    return inside and _TOKENS.fullmatch(path.name) is not None


def _from_summary(path: Path, check_sums: bool = True) -> ExpertScores:
    scores = scores_of(atomic.read_json(path), str(path))
    if check_sums and not _sums_to_one(scores):
        worst = max(np.abs(scores.values["token"].sum(axis=1) - 1))
        raise InputError(
            f"{path}: a layer's token scores do not sum to one (off by up to {worst:.2f}), as the "
            "reference's later script writes them: give the per-token files beside it"
        )
    return scores


def _sums_to_one(scores: ExpertScores) -> bool:
    token = scores.values.get("token")
    return token is None or bool(np.all(np.abs(token.sum(axis=1) - 1) < _SUM_ERROR))


def _table(table: Any, layers: Sequence[str], experts: Sequence[str], where: str) -> np.ndarray:
    if not isinstance(table, Mapping) or set(table) != set(layers):
        raise InputError(f"{where} has other layers than the first table")
    found = np.zeros((len(layers), len(experts)))
    for i, layer in enumerate(layers):
        row = table[layer]
        if not isinstance(row, Mapping) or set(row) != set(experts):
            size = len(row) if isinstance(row, Mapping) else 0
            raise InputError(
                f"{where}: layer {layer} has {size} experts and layer {layers[0]} "
                f"{len(experts)}: they must be the same"
            )
        for j, expert in enumerate(experts):
            value = row[expert]
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise InputError(
                    f"{where}: layer {layer}, expert {expert} is {value!r}, not a score of 0 or "
                    "more: score the data again"
                )
            found[i, j] = value
    return found


def _add(total: np.ndarray | None, more: np.ndarray) -> np.ndarray:
    if total is None:
        return more
    size = max(len(total), len(more))
    return np.pad(total, (0, size - len(total))) + np.pad(more, (0, size - len(more)))


def _read_tokens(path: Path, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """All expert ids of a file, and their gate scores, flat."""
    ids: list[np.ndarray] = []
    gates: list[np.ndarray] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        left, double, right = line.partition("\t\t")
        try:
            ids.append(np.array(left.split("\t"), dtype=np.int64))
            gates.append(np.array(right.split("\t"), dtype=np.float64))
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}: ids, two tabs, gate scores") from None
        if not double or len(ids[-1]) != len(gates[-1]) or len(ids[-1]) % top_k:
            raise InputError(
                f"{path}:{number}: {len(ids[-1])} expert ids and {len(gates[-1])} gate scores are "
                f"not equally many, or not {top_k} per token: the line is cut, or --top_k differs"
            )
        if ids[-1].min() < 0 or not np.all((gates[-1] >= 0) & np.isfinite(gates[-1])):
            raise InputError(f"{path}:{number}: an id or gate score is negative or NaN")
    if not ids:
        raise InputError(f"{path} is empty: score the data again")
    return np.concatenate(ids), np.concatenate(gates)
