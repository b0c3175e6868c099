"""A wrong MoE config is refused in one line with both numbers."""

import dataclasses
import json

import pytest

from moejax.core.errors import InputError
from moejax.moe.config import CONVENTIONS, MoEConfig


def test_counts_include_the_shared_expert():
    config = MoEConfig(num_experts=8, top_k=6)
    assert (config.num_routed, config.routed_per_token) == (7, 5)
    plain = MoEConfig(num_experts=8, top_k=2, num_shared=0, weighting="selected")
    assert (plain.num_routed, plain.routed_per_token) == (8, 2)


PLAIN = {"num_experts": 8, "top_k": 3, **CONVENTIONS["mixtral"]}
SIGMOID = {"num_experts": 8, "top_k": 3, **CONVENTIONS["deepseek_v3"]}
CHOICE = {"num_experts": 8, "top_k": 3, **CONVENTIONS["expert_choice"]}


@pytest.mark.parametrize("fields", [{"num_experts": 8, "top_k": 3}, PLAIN, SIGMOID, CHOICE])
def test_goes_through_json(fields):
    config = MoEConfig(**fields)
    assert MoEConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_folder_written_before_there_were_other_routers_is_xft():
    stored = {
        "num_experts": 8,
        "top_k": 6,
        "num_shared": 1,
        "gate": "mlp",
        "weighting": "normalized",
        "noise": True,
        "balance_weight": 0.01,
        "count_padding": False,
        "load_estimator": "noisy_logits",
    }
    config = MoEConfig(**stored)
    assert config == MoEConfig(8, 6)
    assert (config.score, config.selection, config.balance) == ("softmax", "top_k", "cv_squared")
    assert config.num_groups == config.scale == 1 and config.expert_ffn is None
    assert config.z_weight == config.jitter == config.shared_ffn == 0 and config.soft_cap is None


def test_every_convention_is_a_config():
    for name, fields in CONVENTIONS.items():
        config = MoEConfig(8, 2, **(fields | ({"shared_ffn": 4} if name == "qwen2_moe" else {})))
        assert (config.num_routed, config.routed_per_token) == (8, 2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_experts": 4, "top_k": 5}, ["top_k=5", "num_experts=4"]),
        ({"num_experts": 4, "top_k": 1}, ["top_k=1", "top_k >= 2"]),
        ({"num_experts": 1, "top_k": 1}, ["num_experts=1", "at least 2"]),
        ({"num_experts": 4, "top_k": 2, "num_shared": 2}, ["num_shared=2"]),
        ({"num_experts": 4, "top_k": 3, "gate": "relu"}, ["'relu'", "mlp, linear"]),
        ({"num_experts": 4, "top_k": 3, "weighting": "x"}, ["'x'", "normalized, unnormalized"]),
        ({"num_experts": 4, "top_k": 3, "weighting": "selected"}, ["num_shared=0", "num_shared=1"]),
        ({"num_experts": 4, "top_k": 3, "num_shared": 0}, ["num_shared=1", "num_shared=0"]),
        ({"num_experts": 4, "top_k": 3, "balance_weight": -1.0}, ["balance_weight=-1.0"]),
        ({"num_experts": 4, "top_k": 3, "load_estimator": "y"}, ["'y'", "noisy_logits"]),
        (PLAIN | {"top_k": 9}, ["top_k=9", "num_experts=8", "top_k <= 8"]),
        (PLAIN | {"score": "tanh"}, ["'tanh'", "softmax, sigmoid"]),
        (PLAIN | {"selection": "random"}, ["'random'", "top_k, expert_choice"]),
        (PLAIN | {"group_score": "mean"}, ["'mean'", "max, top2_sum"]),
        (PLAIN | {"balance": "even"}, ["'even'", "switch, sequence"]),
        (PLAIN | {"balance_scope": "pod"}, ["'pod'", "local, global"]),
        (PLAIN | {"num_groups": 3}, ["num_groups=3", "8 routed", "1, 2, 4, 8"]),
        (PLAIN | {"num_groups": 0}, ["num_groups=0", "1, 2, 4, 8"]),
        (PLAIN | {"num_groups": 4, "top_groups": 5}, ["top_groups=5", "num_groups=4"]),
        (
            PLAIN | {"num_groups": 4, "top_groups": 1},
            ["top_groups=1", "hold 2", "the 3", "top_groups >= 2"],
        ),
        (
            SIGMOID | {"num_groups": 8, "top_groups": 4},
            ["top2_sum", "num_groups=8", "leaves 1", "num_groups <= 4"],
        ),
        (PLAIN | {"scale": 0.0}, ["scale=0.0"]),
        (PLAIN | {"soft_cap": -1.0}, ["soft_cap=-1.0"]),
        (PLAIN | {"jitter": 1.0}, ["jitter=1.0", "less than 1"]),
        (PLAIN | {"z_weight": -1.0}, ["z_weight=-1.0"]),
        (PLAIN | {"expert_ffn": 0}, ["expert_ffn=0"]),
        (PLAIN | {"shared_ffn": -4}, ["shared_ffn=-4"]),
        (PLAIN | {"shared_gate": True}, ["shared_gate=True", "shared_ffn=0"]),
        (PLAIN | {"bias_rate": 0.0}, ["bias_rate=0.0"]),
        (CHOICE | {"capacity_factor": 0.0}, ["capacity_factor=0.0"]),
        (CHOICE | {"weighting": "selected"}, ["expert_choice", "'scores'", "'selected'"]),
        (CHOICE | {"balance": "switch"}, ["expert_choice", "balance='none'", "'switch'"]),
        (CHOICE | {"selection_bias": True}, ["expert_choice", "selection_bias=False"]),
        ({"num_experts": 4, "top_k": 3, "score": "sigmoid"}, ["'normalized'", "'softmax'"]),
        ({"num_experts": 5, "top_k": 3, "scale": 2.0}, ["'normalized'", "scale=1.0", "scale=2.0"]),
        (
            SIGMOID | {"noise": True, "balance": "cv_squared"},
            ["noise=True", "selection_bias=False", "selection_bias=True"],
        ),
    ],
)
def test_bad_fields_are_named(fields, words):
    with pytest.raises(InputError) as caught:
        MoEConfig(**fields)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
