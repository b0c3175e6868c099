"""What coarser experts would cost ESFT: experts tied into groups, simulated on recorded routing.

ESFT, arXiv 2407.01906, figure 7. Two experts are alike where the same tokens choose them: by the
cosine of their rows of the co-occurrence matrix. Groups are made one after the other, the most
alike pair first, then whoever is most alike to the group on average. A group's affinity to a token
is its members' mean gate score; as many experts as before are active, now in whole groups; the
groups whose share of choices reaches the threshold are trained. An expert outside a token's
recorded K counts as 0 there, where the paper has its full softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.core.errors import InputError
from moejax.methods.expert_selection import ExpertScores, select_by_threshold


def co_occurrence(ids_NK: np.ndarray, num_experts: int) -> np.ndarray:
    """How many tokens chose both experts, [J, J]; the diagonal is how many chose one."""
    chosen_NJ = np.zeros((len(ids_NK), num_experts), np.float32)
    np.put_along_axis(chosen_NJ, ids_NK, 1.0, axis=1)
    return chosen_NJ.T @ chosen_NJ


def group_experts(counts_JJ: np.ndarray, size: int) -> np.ndarray:
    """Groups [J / size, size] of experts with like co-occurrence; InputError if some are left."""
    num_experts = len(counts_JJ)
    if size < 1 or num_experts % size:
        raise InputError(f"groups of {size} do not divide {num_experts} experts: choose a divisor")
    rows = counts_JJ / np.maximum(np.linalg.norm(counts_JJ, axis=1, keepdims=True), 1e-12)
    like = (rows @ rows.T).astype(np.float64)
    np.fill_diagonal(like, -np.inf)
    left = set(range(num_experts))
    groups = []
    while left:
        rest = np.array(sorted(left))
        if size == 1:
            group = [int(rest[0])]
        else:
            best = np.unravel_index(np.argmax(like[np.ix_(rest, rest)]), (len(rest), len(rest)))
            group = [int(rest[i]) for i in best]
        while len(group) < size:
            others = np.array(sorted(left - set(group)))
            group.append(int(others[np.argmax(like[np.ix_(others, np.array(group))].mean(axis=1))]))
        left -= set(group)
        groups.append(sorted(group))
    return np.array(sorted(groups))


def simulate(
    ids_NK: np.ndarray, gates_NK: np.ndarray, groups_GS: np.ndarray, threshold: float
) -> dict[str, float]:
    """Groups to train in one layer, by token score: {"groups", "experts", "share" of them all}."""
    num_groups, size = groups_GS.shape
    group_of = np.empty(groups_GS.size, np.int64)
    group_of[groups_GS.reshape(-1)] = np.repeat(np.arange(num_groups), size)
    affinity_NG = np.zeros((len(ids_NK), num_groups))
    rows = np.broadcast_to(np.arange(len(ids_NK))[:, None], ids_NK.shape)
    np.add.at(affinity_NG, (rows, group_of[ids_NK]), gates_NK / size)
    active = max(1, round(ids_NK.shape[1] / size))
    best_NA = np.argsort(-affinity_NG, axis=1, kind="stable")[:, :active]
    ratio = np.bincount(best_NA.reshape(-1), minlength=num_groups) / best_NA.size
    scores = ExpertScores((0,), tuple(range(num_groups)), {"token": ratio[None]})
    number = len(select_by_threshold(scores, "token", threshold).experts[0])
    return {"groups": number, "experts": number * size, "share": number / num_groups}


def group_sizes(
    layers: Sequence[tuple[np.ndarray, np.ndarray]],
    num_experts: int,
    sizes: Sequence[int],
    threshold: float = 0.2,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Per size the means over layers, grouped by co-occurrence and, the control, at random.

    layers: (ids [N, K], gates [N, K]) of each layer; groups are made of the first half of the
    tokens and judged on the second.
    """
    found = []
    for size in sizes:
        kinds: dict[str, list[dict[str, float]]] = {"co_occurrence": [], "random": []}
        for number, (ids, gates) in enumerate(layers):
            half = len(ids) // 2
            order = np.random.default_rng([seed, number]).permutation(num_experts)
            made = {
                "co_occurrence": group_experts(co_occurrence(ids[:half], num_experts), size),
                "random": order.reshape(-1, size),
            }
            for kind, groups in made.items():
                kinds[kind].append(simulate(ids[half:], gates[half:], groups, threshold))
        row: dict[str, Any] = {"size": size}
        for kind, values in kinds.items():
            row[kind] = {n: float(np.mean([v[n] for v in values])) for n in values[0]}
        found.append(row)
    return found
