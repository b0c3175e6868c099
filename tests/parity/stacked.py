"""transformers 5 stacks experts in memory; files, and we, have one tensor for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_PARTS = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}


def stack(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors by the names in files -> by those of the model in memory. Inverse: `unstack`."""
    found: dict[str, np.ndarray] = {}
    groups: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    for name, value in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            found[_renamed(name)] = value
        else:
            where = int(match[2]), _PARTS[match[3]]
            groups.setdefault(_renamed(match[1]), {})[where] = value
    for module, parts in groups.items():
        experts = range(1 + max(e for e, _ in parts))
        both = [np.concatenate([parts[e, 0], parts[e, 1]]) for e in experts]
        found[f"{module}.experts.gate_up_proj"] = np.stack(both)
        found[f"{module}.experts.down_proj"] = np.stack([parts[e, 2] for e in experts])
    return found


def unstack(stacked: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of the tensors in files that `names` lists, out of the model's own."""
    found = {}
    for name in names:
        match = _EXPERT.fullmatch(name)
        if match is None:
            found[name] = stacked[_renamed(name)]
            continue
        module, expert, part = f"{_renamed(match[1])}.experts", int(match[2]), _PARTS[match[3]]
        if part == 2:
            found[name] = stacked[f"{module}.down_proj"][expert]
        else:
            found[name] = np.split(stacked[f"{module}.gate_up_proj"][expert], 2)[part]
    return found


def _renamed(name: str) -> str:
    return name.replace(".block_sparse_moe", ".mlp")
