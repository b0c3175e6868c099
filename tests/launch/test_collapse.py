"""The two small problems of launch.collapse, against what can be shown about them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from launch import collapse_problems as collapse
from tests import commands


@pytest.fixture(scope="module")
def bandit():
    return collapse.make_bandit()


def test_exact_gradient_ascends_and_favours_the_likelier_good_arm(bandit):
    run = collapse.exact_gradient(bandit, 2000)
    earned = run @ bandit.rewards
    assert (np.diff(earned) >= -1e-12).all() and earned[-1] > 0.99
    good = bandit.good
    order = np.argsort(bandit.start[good])
    ratios = run[-1][good][order] / bandit.start[good][order]
    assert (np.diff(ratios) > 0).all()


def test_its_step_is_the_gradient(bandit):
    beta, lr, eps = 0.3, 1e-3, 1e-6

    def objective(logits):
        policy = np.exp(logits) / np.exp(logits).sum()
        return policy @ bandit.rewards - beta * policy @ np.log(policy / bandit.start)

    logits = np.log(collapse.make_bandit(seed=5).start)
    # From another place than the start, where the KL has a gradient of its own.
    policy = np.exp(logits)
    gain = bandit.rewards - beta * np.log(policy / bandit.start)
    step = policy * (gain - policy @ gain)
    numeric = [
        (objective(logits + eps * e) - objective(logits - eps * e)) / (2 * eps)
        for e in np.eye(len(logits))
    ]
    np.testing.assert_allclose(step, numeric, atol=1e-8)
    first = collapse.exact_gradient(bandit, 1, lr, beta)
    moved = np.log(first[1] / first[0])
    wanted = lr * bandit.start * (bandit.rewards - bandit.start @ bandit.rewards)
    np.testing.assert_allclose(moved - moved.mean(), wanted - wanted.mean(), atol=1e-7)


def test_kl_reaches_the_closed_form_and_keeps_the_odds(bandit):
    end = collapse.exact_gradient(bandit, 20_000, lr=1.0, beta=0.25)[-1]
    np.testing.assert_allclose(end, collapse.closed_form(bandit, 0.25), atol=1e-6)
    good = bandit.good
    odds = end[good] / bandit.start[good]
    np.testing.assert_allclose(odds, odds[0], rtol=1e-4)


def test_sampling_drifts_to_one_arm_which_depends_on_the_draws(bandit):
    winners, used = [], []
    for seed in range(6):
        end = collapse.sampled_gradient(bandit, 6000, seed=seed)[-1:]
        winners.append(int(end[0].argmax()))
        used.append(collapse.spread_of_good(bandit, end)[0])
    assert np.median(used) < 1.5 and len(set(winners)) > 1


def test_tuning_raises_pass_1_and_lowers_pass_k():
    table = collapse.tuning_table(*collapse.tune(2000))
    first, last = table[0], table[-1]
    assert last["pass@1"] > first["pass@1"] + 0.1
    assert last["variance"] > first["variance"] + 0.05
    assert last["pass@16"] < first["pass@16"] - 0.05
    for row in table:
        assert row["bound@2"] == pytest.approx(row["pass@2"], abs=1e-12)
        assert row["bound@16"] >= row["pass@16"] - 1e-12


def test_the_command(tmp_path):
    asked = ["collapse", f"--out={tmp_path}", "--steps=200"]
    done = commands.run(*asked)
    assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "collapse.json").read_text())) == {"bandit", "tuning"}
    assert (tmp_path / "collapse.png").stat().st_size > 10_000
    done = commands.run(*asked, "--beta=0")
    assert done.returncode == 2 and "must be above 0" in done.stderr
