"""Scores of experts: against the definition, padding and packing left out, on several devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.methods import expert_scores
from moejax.methods.expert_gradients import gradient_scores
from moejax.methods.score_stability import stability
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.models.families import by_architecture
from moejax.models.transformer import ForwardOptions
from moejax.moe.config import CONVENTIONS, MoEConfig
from tests import fake_devices
from tests.parity.cases import fields_of

ROOT = Path(__file__).parents[2]
FAMILIES = ("deepseek_v2-q_rank_groups_scaled_biases",)
MORE = ("qwen2_moe-dense_first_windows_sum_to_one", "mixtral-grouped", "olmoe-mha")
MORE += ("qwen3_moe-odd_head_sum_to_one", "deepseek_v2-lite_yarn")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MORE]
XFT = ModelConfig("llama", 61, 2, 16, 24, 2, 1, 8, moe=MoEConfig(5, 3))
V3 = MoEConfig(8, 2, **CONVENTIONS["deepseek_v3"])
SIGMOID = ModelConfig("deepseek_v2", 61, 3, 16, 24, 2, 2, 8, moe=V3, num_dense_layers=1)


def config_of(name: str) -> ModelConfig:
    if name in ("xft", "sigmoid"):
        return XFT if name == "xft" else SIGMOID
    fields = fields_of(name)
    return by_architecture(fields["architectures"][0]).config_from_hf(fields)


def batch_of(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of three, one and two sequences, padded."""
    rng = np.random.default_rng(seed)
    lengths = [[4, 7, 3], [9], [6, 2]]
    segments, positions = np.zeros((3, 16), np.int32), np.zeros((3, 16), np.int32)
    for row, sizes in enumerate(lengths):
        ends = np.cumsum([0, *sizes])
        for i, size in enumerate(sizes):
            segments[row, ends[i] : ends[i + 1]] = i + 1
            positions[row, ends[i] : ends[i + 1]] = np.arange(size)
    tokens = rng.integers(0, 61, segments.shape).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segments, "positions": positions}


def definition(params, config: ModelConfig, batch, average: str) -> dict[str, np.ndarray]:
    """Both scores by equations 7 and 8, out of a pass where every sequence has its own row."""
    rows, segments = [], []
    for row, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in range(1, ids.max() + 1):
            mine = ids == segment
            rows.append(np.pad(row[mine], (0, 16 - mine.sum())))
            segments.append((np.arange(16) < mine.sum()).astype(np.int32))
    options = ForwardOptions(trace_routing=True)
    forward = jax.jit(transformer.forward, static_argnames=("config", "options"))
    output = forward(
        params, config, np.stack(rows), segment_ids_BT=np.stack(segments), options=options
    )
    trace = output.stats.trace
    g = np.zeros((*trace.experts_BTK.shape[:3], config.moe.num_experts))
    np.put_along_axis(g, np.asarray(trace.experts_BTK), np.asarray(trace.scores_BTK), 3)
    tables = [g[:, i, : s.sum(), config.moe.num_shared :] for i, s in enumerate(segments)]
    if average == "pooled":
        tables = [np.concatenate(tables, axis=1)]
    token = [np.mean(t > 0, axis=1) / config.moe.routed_per_token for t in tables]
    gate = [np.mean(t, axis=1) for t in tables]
    return {"token": np.mean(token, axis=0), "gate": np.mean(gate, axis=0)}


@pytest.mark.parametrize("name", ["xft", "sigmoid", *FAMILIES, *SLOW])
def test_scores_are_their_definition(name):
    config = config_of(name)
    params = transformer.init_params(config, jax.random.key(1))
    batch = batch_of()
    counted = expert_scores.count(params, config, [batch], num_segments=3)
    assert int(counted.pooled.tokens) == (batch["segment_ids"] > 0).sum()
    assert counted.layers[0] == config.num_dense_layers
    assert counted.experts[0] == config.moe.num_shared
    for average in expert_scores.AVERAGES:
        wanted = definition(params, config, batch, average)
        for kind, value in counted.scores(average).values.items():
            np.testing.assert_allclose(value, wanted[kind], rtol=2e-4, atol=1e-6, err_msg=kind)
    np.testing.assert_allclose(counted.scores().values["token"].sum(axis=1), 1.0, rtol=1e-6)


def test_batches_add_up_and_sequences_sum_to_the_pool():
    params = transformer.init_params(XFT, jax.random.key(0))
    batches = [batch_of(seed) for seed in range(3)]
    counted = expert_scores.count(params, XFT, batches, num_segments=3)
    np.testing.assert_array_equal(counted.sequences.chosen.sum(axis=0), counted.pooled.chosen)
    assert counted.sequences.tokens.tolist() == [4, 7, 3, 9, 6, 2] * 3
    alone = [expert_scores.count(params, XFT, [batch], num_segments=3) for batch in batches]
    total = sum(np.asarray(one.pooled.chosen) for one in alone)
    np.testing.assert_array_equal(counted.pooled.chosen, total)
    half = counted.subset(np.arange(6))
    np.testing.assert_array_equal(half.pooled.chosen, alone[0].pooled.chosen)


def test_a_dense_model_has_no_experts_to_score():
    dense = ModelConfig("llama", 61, 1, 16, 24, 2, 1, 8)
    params = transformer.init_params(dense, jax.random.key(0))
    with pytest.raises(InputError, match="dense"):
        expert_scores.count(params, dense, [batch_of()], num_segments=3)


def test_the_ranking_of_one_distribution_becomes_stable():
    rng = np.random.default_rng(0)
    share = np.array([0.4, 0.3, 0.1, 0.05, 0.05, 0.05, 0.03, 0.02])
    chosen = rng.multinomial(200, share, size=(256, 1)).astype(np.int32)
    sequences = expert_scores.Counters(chosen, chosen / 2.0, np.full(256, 100))
    pooled = expert_scores.Counters(chosen.sum(0), chosen.sum(0) / 2.0, np.int64(25600))
    counted = expert_scores.Counted(pooled, sequences, (0,), tuple(range(8)), 2)
    curve = stability(counted, threshold=0.5)
    assert curve.sizes[-1] == 12800 and curve.overlap[-1] == 1.0 and curve.stable_at is not None
    assert curve.chosen[-1] == 1.0


def test_gradients_point_at_the_experts_that_the_loss_uses():
    params = transformer.init_params(XFT, jax.random.key(0))

    def loss(params, batch):
        w = params["layers"]["0"]["moe"]["experts"]["w_up"]
        return (3 * w[0, 2].sum() + 4 * w[1, 1].sum()) * batch

    scores = gradient_scores(loss, params, XFT, [1.0, 2.0])
    np.testing.assert_allclose(scores, [[0, 1, 0, 0], [1, 0, 0, 0]])


PROGRAM = """
import json, jax, numpy as np
from moejax.core.mesh import make_mesh
from moejax.methods import expert_scores
from moejax.models import transformer
from tests.methods.test_expert_scores import XFT, batch_of
params = transformer.init_params(XFT, jax.random.key(0))
batches = [{n: np.pad(a, ((0, 1), (0, 0))) for n, a in batch_of(s).items()} for s in range(2)]
ends = [expert_scores.count(params, XFT, batches, num_segments=3, mesh=mesh)
        for mesh in (None, make_mesh(data=2, fsdp=2))]
print(json.dumps([
    [np.array_equal(getattr(ends[0].pooled, n), getattr(ends[1].pooled, n))
     for n in ("chosen", "tokens")],
    np.allclose(ends[0].pooled.gates, ends[1].pooled.gates, rtol=1e-5),
    np.array_equal(ends[0].sequences.chosen, ends[1].sequences.chosen)]))
"""


def test_four_devices_count_what_one_does():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=fake_devices.environment(4),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [[True, True], True, True]
