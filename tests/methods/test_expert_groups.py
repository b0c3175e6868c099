"""The group-size simulation on routing whose answer is known; the ledger of two models."""

import jax
import numpy as np
import pytest

from moejax.core import tree
from moejax.core.errors import InputError
from moejax.methods import expert_groups
from moejax.methods.routing_ledger import routing_ledger
from moejax.models import transformer
from tests.methods.test_expert_scores import XFT, batch_of


def routing(num_tokens: int = 400):
    """Experts 0 and 4, 1 and 5, 2 and 6, 3 and 7 are always chosen together, 0 and 4 mostly."""
    first = np.random.default_rng(0).choice(4, num_tokens, p=[0.7, 0.1, 0.1, 0.1])
    ids = np.stack([first, first + 4], axis=1)
    return ids, np.full(ids.shape, 0.4)


def test_experts_that_are_chosen_together_make_a_group():
    ids, gates = routing()
    groups = expert_groups.group_experts(expert_groups.co_occurrence(ids, 8), 2)
    assert groups.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    found = expert_groups.simulate(ids, gates, groups, 0.5)
    assert found == {"groups": 1, "experts": 2, "share": 0.25}
    alone = expert_groups.simulate(ids, gates, np.arange(8)[:, None], 0.5)
    assert alone["experts"] == 2
    rows = expert_groups.group_sizes([(ids, gates)], 8, [1, 2, 4])
    assert [row["size"] for row in rows] == [1, 2, 4]
    assert rows[1]["co_occurrence"]["experts"] <= rows[1]["random"]["experts"]
    with pytest.raises(InputError, match="groups of 3 do not divide 8"):
        expert_groups.group_sizes([(ids, gates)], 8, [3])


def test_the_ledger_sees_what_moved():
    params = transformer.init_params(XFT, jax.random.key(0))
    same = routing_ledger(params, params, XFT, [batch_of()])
    assert same["mean"]["overlap"] == 1.0 and same["mean"]["kl"] == 0.0
    flat = tree.flatten(params)
    down = flat["layers/0/moe/experts/w_down"]
    moved = tree.unflatten(flat | {"layers/0/moe/experts/w_down": down.at[0].add(1.0)})
    found = routing_ledger(params, moved, XFT, [batch_of()])
    assert found["layers"][0]["overlap"] == 1.0  # nothing before it changed
    assert found["layers"][1]["overlap"] < 1.0 and found["layers"][1]["kl"] > 0
    assert found["num_tokens"] == 31
