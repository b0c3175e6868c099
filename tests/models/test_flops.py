"""Counts from a config agree with the tree, with known models, and with what XLA counts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from moejax.core import tree
from moejax.models import transformer
from moejax.models.config import AttentionConfig, ModelConfig
from moejax.models.flops import (
    active_params,
    forward_flops_per_token,
    merge_flops,
    num_params,
    train_flops,
)
from moejax.moe.config import MoEConfig

SMOLLM2_135M = ModelConfig(
    family="llama",
    vocab_size=49152,
    num_layers=30,
    d_model=576,
    d_ff=1536,
    num_heads=9,
    num_kv_heads=3,
    head_size=64,
    tie_embeddings=True,
)
DEEPSEEK_CODER_1B = ModelConfig(
    family="llama",
    vocab_size=32256,
    num_layers=24,
    d_model=2048,
    d_ff=5504,
    num_heads=16,
    num_kv_heads=16,
    head_size=128,
)
XFT_1B = dataclasses.replace(DEEPSEEK_CODER_1B, moe=MoEConfig(num_experts=8, top_k=6))


def test_parameters_of_known_models():
    assert num_params(SMOLLM2_135M) == active_params(SMOLLM2_135M) == 134_515_008
    assert num_params(DEEPSEEK_CODER_1B) == 1_346_471_936
    expert = 24 * 3 * 2048 * 5504
    router = 24 * (2 * 2048 * 7 + 49)
    assert num_params(XFT_1B) == 1_346_471_936 + 7 * expert + router
    assert active_params(XFT_1B) == 1_346_471_936 + 5 * expert + router


def test_flops_of_a_long_model_are_two_per_parameter():
    """The 2N rule, where attention and the embedding's look-up are small or taken out."""
    lookup = 32256 * 2048
    flops = forward_flops_per_token(DEEPSEEK_CODER_1B, 1)
    assert flops == pytest.approx(2 * (num_params(DEEPSEEK_CODER_1B) - lookup), rel=1e-3)
    flops = forward_flops_per_token(XFT_1B, 1)
    assert flops == pytest.approx(2 * (active_params(XFT_1B) - lookup), rel=1e-3)


def test_flops_are_what_xla_counts():
    config = ModelConfig("llama", 1024, 1, 128, 512, 4, 2, 32, tie_embeddings=True)
    seq_len = 64
    tokens = jax.ShapeDtypeStruct((2, seq_len), jnp.int32)
    params = transformer.abstract_params(config)
    run = jax.jit(lambda p, t: transformer.logits(p, config, t))
    counted = run.lower(params, tokens).compile().cost_analysis()["flops"]
    # XLA counts the masked half of the scores too.
    causal = 2 * 4 * 32 * (seq_len - 1)
    expected = 2 * seq_len * (forward_flops_per_token(config, seq_len) + causal)
    assert counted == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("window", [5, 16, 99])
def test_a_window_is_counted_pair_by_pair(window):
    config = ModelConfig(
        "gemma2", 64, 2, 16, 32, 4, 2, 6, attention=AttentionConfig((window, 0)), gated=False
    )
    seq_len = 16
    seen = sum(min(t, window) + t for t in range(1, seq_len + 1)) / seq_len
    matrices = 2 * (2 * 16 * 4 * 6 + 2 * 16 * 2 * 6 + 2 * 16 * 32) + 16 * 64
    expected = 2 * matrices + 4 * 4 * 6 * seen
    assert forward_flops_per_token(config, seq_len) == pytest.approx(expected)


def test_training_is_three_forward_passes():
    assert train_flops(SMOLLM2_135M, 10, 128) == 30 * forward_flops_per_token(SMOLLM2_135M, 128)
    noise = 24 * 2 * 2048 * 7
    assert train_flops(XFT_1B, 10, 128) == 30 * (forward_flops_per_token(XFT_1B, 128) + noise)


def test_frozen_weights_have_no_gradient_and_inputs_do():
    forward = forward_flops_per_token(DEEPSEEK_CODER_1B, 128)
    matrices = 2 * (num_params(DEEPSEEK_CODER_1B) - 2 * 32256 * 2048 - 49 * 2048)
    head = 2 * 32256 * 2048

    def saved(*freeze, config=DEEPSEEK_CODER_1B):
        return train_flops(config, 1, 128) - train_flops(config, 1, 128, freeze)

    assert saved("embed/**", "**/scale") == 0  # a look-up and norms
    assert saved("layers/**") == matrices
    assert saved("lm_head/*") == head
    everything = train_flops(DEEPSEEK_CODER_1B, 1, 128, ("**",))
    scores = forward - matrices - head
    assert everything == pytest.approx(2 * forward + scores)  # dx alone; scores have two inputs
    assert saved("embed/tokens", config=SMOLLM2_135M) == 2 * 49152 * 576  # its tied head
    experts = 24 * 3 * 2048 * 5504 * 6
    assert saved("**/experts/**", config=XFT_1B) == pytest.approx(2 * experts)
    assert saved("**/router/**", config=XFT_1B) == pytest.approx(24 * 2 * (2 * 2048 * 7 + 49))


def test_merging_costs_less_than_training_dense_and_grows_with_steps():
    dense = train_flops(DEEPSEEK_CODER_1B, 65536, 1024)
    one, two = merge_flops(XFT_1B, 65536, 1024, 1), merge_flops(XFT_1B, 65536, 1024, 2)
    assert 2 / 3 * dense < one < dense
    experts, _ = tree.split(transformer.abstract_params(XFT_1B), "**/experts/**")
    assert two - one == 6 * tree.num_params(experts) * 7 / 8
