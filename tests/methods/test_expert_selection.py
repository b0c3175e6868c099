"""Selecting experts by their scores, and the files of scores and configs."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.core.errors import InputError
from moejax.methods import expert_config, expert_selection, score_files
from moejax.methods.expert_config import ExpertConfig
from moejax.methods.expert_selection import ExpertScores, select_by_bytes, select_by_threshold


def scores_of(rows, name="token") -> ExpertScores:
    rows = np.asarray(rows, np.float64)
    return ExpertScores(
        tuple(range(1, len(rows) + 1)), tuple(range(rows.shape[1])), {name: rows}
    )


def test_ties_go_to_the_lower_expert_and_the_order_is_by_score():
    scores = scores_of([[0.1, 0.3, 0.1, 0.3, 0.2], [0.05, 0.05, 0.05, 0.05, 0.8]])
    assert select_by_threshold(scores, "token", 0.65).experts == {1: (1, 3, 4), 2: (4,)}
    assert select_by_threshold(scores, "token", 1.0).experts[1] == (1, 3, 4, 0, 2)


def test_the_threshold_is_reached_not_passed():
    assert select_by_threshold(scores_of([[0.1, 0.1, 0.1, 0.7]]), "token", 0.7).experts[1] == (3,)
    sums = scores_of([[0.05] * 20])
    assert len(select_by_threshold(sums, "token", 0.2).experts[1]) == 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=40), st.integers(1, 100))
def test_the_smallest_prefix(numbers, percent):
    total = sum(numbers) or 1
    row, threshold = [n / total for n in numbers], percent / 100
    chosen = select_by_threshold(scores_of([row]), "token", threshold).experts[1]
    mass = math.fsum(row[e] for e in chosen)
    assert mass >= threshold - 1e-12 or len(chosen) == len(row)
    assert mass - row[chosen[-1]] < threshold
    left = set(range(len(row))) - set(chosen)
    assert all(row[e] <= row[chosen[-1]] for e in left)


def test_a_budget_is_filled_evenly_and_never_passed():
    scores = scores_of([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]])
    assert select_by_bytes(scores, "token", 35, 10).experts == {1: (0, 1), 2: (0,)}
    wanted = select_by_threshold(scores, "token", 0.6).experts
    assert select_by_bytes(scores, "token", 1000, 10, threshold=0.6).experts == wanted
    with pytest.raises(InputError, match="9 bytes holds no expert of 10"):
        select_by_bytes(scores, "token", 9, 10)


def test_the_random_control_has_the_same_counts_and_no_repeats():
    scores = scores_of(np.full((3, 16), 1 / 16))
    counts = {1: 4, 2: 0, 3: 16}
    draws = [expert_selection.select_random(scores, counts, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert expert_selection.counts_of(draws[0]) == counts
    assert all(len(set(ids)) == len(ids) for ids in draws[0].experts.values())


@pytest.mark.parametrize("threshold", [0.0, -0.2, 1.01, float("nan")])
def test_thresholds_outside_are_refused(threshold):
    with pytest.raises(InputError, match=r"outside \(0, 1\]"):
        select_by_threshold(scores_of([[1.0]]), "token", threshold)


def write_tokens(folder, layer, ids_TK, gates_TK):
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"expert_weights_{layer}.txt"
    with open(path, "a") as file:
        file.write(score_files.token_line(np.asarray(ids_TK), np.asarray(gates_TK)))
    return path


def test_per_token_files_pool_over_tokens_of_all_ranks(tmp_path):
    write_tokens(tmp_path / "rank_0", 1, [[0, 2], [2, 3]], [[0.5, 0.25], [0.5, 0.125]])
    path = write_tokens(tmp_path / "rank_1", 1, [[2, 0]], [[0.75, 0.1]])
    scores, _ = score_files.read_scores(tmp_path, top_k=2)
    np.testing.assert_allclose(scores.values["token"], [[2 / 6, 0, 3 / 6, 1 / 6]])
    np.testing.assert_allclose(scores.values["gate"], [[0.6 / 3, 0, 1.5 / 3, 0.125 / 3]])
    alone, _ = score_files.read_scores(path, top_k=2)
    np.testing.assert_allclose(alone.values["token"], [[0.5, 0, 0.5]])


def test_a_summary_comes_back(tmp_path):
    scores = scores_of(np.random.default_rng(0).dirichlet(np.ones(8), 3))
    (tmp_path / "summary.json").write_text(json.dumps(score_files.summary_json(scores, None)))
    again, source = score_files.read_scores(tmp_path)
    assert source.endswith("summary.json") and again.layers == (1, 2, 3)
    np.testing.assert_array_equal(again.values["token"], scores.values["token"])
    rounded = score_files.scores_of(score_files.summary_json(scores), "here")
    np.testing.assert_array_equal(rounded.values["token"], scores.rounded(4).values["token"])


def test_a_summary_normalised_over_layers_is_passed_over_or_refused(tmp_path):
    rows = np.array([[0.9, 0.1], [0.5, 0.5]])
    wrong = {"token_scores": {"1": {"0": 0.64, "1": 0.17}, "2": {"0": 0.36, "1": 0.83}}}
    (tmp_path / "summary.json").write_text(json.dumps(wrong))
    with pytest.raises(InputError, match="do not sum to one"):
        score_files.read_scores(tmp_path)
    for layer, row in enumerate(rows, start=1):
        ids = [[0]] * round(10 * row[0]) + [[1]] * round(10 * row[1])
        write_tokens(tmp_path / "rank_0", layer, ids, np.ones((10, 1)))
    scores, source = score_files.read_scores(tmp_path, top_k=1)
    assert "per-token" in source
    np.testing.assert_allclose(scores.values["token"], rows)


BAD = {
    "": "not JSON",
    "{}": "no token_scores",
    '{"token_scores": {"1": {"0": NaN, "1": 1.0}}}': "expert 0 is nan",
    '{"token_scores": {"1": {"0": -0.1, "1": 1.1}}}': "expert 0 is -0.1",
    '{"token_scores": {"1": {"0": 1.0}, "2": {"0": 0.5, "1": 0.5}}}': "layer 2 has 2 experts",
    '{"token_scores": {"a": {"0": 1.0}}}': "layer 'a' is not a number",
}


@pytest.mark.parametrize("text", BAD)
def test_broken_summaries_are_refused_by_name(text, tmp_path):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(InputError, match=BAD[text]):
        score_files.read_scores(tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "is empty"),
        ("1\t2\t\t0.5\n", "not equally many"),
        ("1\t2\t3\t\t0.5\t0.1\t0.1\n", "not 2 per token"),
        ("1\tx\t\t0.5\t0.1\n", ":1: invalid literal"),
        ("1\t2\t\t0.5\tnan\n", "negative or NaN"),
    ],
)
def test_broken_token_files_are_refused_by_line(line, words, tmp_path):
    (tmp_path / "expert_weights_3.txt").write_text(line)
    with pytest.raises(InputError, match=words):
        score_files.read_scores(tmp_path, top_k=2)


def test_a_config_comes_back_byte_for_byte(tmp_path):
    config = ExpertConfig({10: (3, 1), 2: ()}, shared_experts=True)
    expert_config.write(tmp_path / "c.json", config)
    assert (tmp_path / "c.json").read_text() == (
        '{"experts": {"10": [3, 1], "2": []}, "shared_experts": true, "non_expert_modules": false}'
    )
    assert expert_config.read(tmp_path / "c.json") == config
    assert config.pairs == ((10, 1), (10, 3))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"experts": {"1": [3, 4, 3]}}', "layer 1 names expert 3 twice"),
        ('{"experts": {"1": [-3]}}', "not a list of expert numbers"),
        ('{"experts": {"one": [3]}}', "layer 'one' is not a number"),
        ('{"experts": {"1": [3]}, "shared_experts": 1}', "shared_experts is 1"),
        ('{"layers": {}}', "no expert config"),
    ],
)
def test_broken_configs_are_refused(text, words, tmp_path):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=words):
        expert_config.read(tmp_path / "c.json")
