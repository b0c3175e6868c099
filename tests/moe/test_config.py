"""A wrong MoE config is refused in one line with both numbers."""

import dataclasses

import pytest

from moejax.core.errors import InputError
from moejax.moe.config import MoEConfig


def test_counts_include_the_shared_expert():
    config = MoEConfig(num_experts=8, top_k=6)
    assert (config.num_routed, config.routed_per_token) == (7, 5)
    plain = MoEConfig(num_experts=8, top_k=2, num_shared=0, weighting="selected")
    assert (plain.num_routed, plain.routed_per_token) == (8, 2)


def test_goes_through_json():
    config = MoEConfig(num_experts=4, top_k=3, gate="linear", weighting="unnormalized")
    assert MoEConfig(**dataclasses.asdict(config)) == config


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
    ],
)
def test_bad_fields_are_named(fields, words):
    with pytest.raises(InputError) as caught:
        MoEConfig(**fields)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
