"""The loss counts what the mask says, inside segments only, however it is cut into chunks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig
from moejax.train.loss import example_nll, lm_loss, targets, token_losses, token_nll

DENSE = ModelConfig(
    family="llama",
    vocab_size=19,
    num_layers=2,
    d_model=8,
    d_ff=16,
    num_heads=2,
    num_kv_heads=1,
    head_size=4,
    initializer_range=0.5,
)
SPARSE = dataclasses.replace(DENSE, moe=MoEConfig(num_experts=4, top_k=3))


init = jax.jit(transformer.init_params, static_argnums=0)
logits_of = jax.jit(transformer.logits, static_argnums=1)
loss_of = jax.jit(lm_loss, static_argnums=1)


@pytest.fixture(scope="module")
def params():
    return init(DENSE, jax.random.key(0))


def packed() -> dict[str, np.ndarray]:
    """Two rows of 9: segments of 4 and 3 and two pads; one segment of 9."""
    rng = np.random.default_rng(1)
    segment_ids = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0], list(range(9))], np.int32)
    loss_mask = np.array([[0, 0, 1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1]], np.float32)
    tokens = rng.integers(0, 19, (2, 9)).astype(np.int32)
    return dict(tokens=tokens, segment_ids=segment_ids, positions=positions, loss_mask=loss_mask)


def single(batch, row: int, segment: int) -> dict[str, np.ndarray]:
    """One segment as a batch of its own."""
    chosen = batch["segment_ids"][row] == segment
    alone = {name: value[row][chosen][None] for name, value in batch.items()}
    return alone | {"segment_ids": np.ones_like(alone["segment_ids"])}


def test_targets_shift_inside_segments_and_skip_pads():
    batch = packed()
    batch["loss_mask"] = np.ones((2, 9), np.float32)
    ids, weights = targets(batch)
    np.testing.assert_array_equal(weights[0], [1, 1, 1, 0, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(weights[1], [1] * 8 + [0])
    np.testing.assert_array_equal(ids[:, :-1], batch["tokens"][:, 1:])


def test_loss_is_log_softmax_at_the_counted_tokens(params):
    batch = single(packed(), 1, 1)
    logits = np.asarray(logits_of(params, DENSE, batch["tokens"]), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [-logp[0, t - 1, batch["tokens"][0, t]] for t in range(3, 9)]
    loss, metrics = loss_of(params, DENSE, batch)
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-5)
    assert (float(metrics["target_count"]), float(metrics["token_count"])) == (6, 9)


def test_packed_batch_is_its_single_sequences(params):
    batch = packed()
    loss, _ = loss_of(params, DENSE, batch)
    sums, counts = jax.jit(lambda p, b: example_nll(p, DENSE, b, num_segments=2))(params, batch)
    assert sums.shape == (2, 2) and float(counts[1, 1]) == 0 == float(sums[1, 1])
    total = 0.0
    for row, segment in ((0, 1), (0, 2), (1, 1)):
        alone, metrics = loss_of(params, DENSE, single(batch, row, segment))
        assert float(counts[row, segment - 1]) == float(metrics["target_count"])
        value = float(alone * metrics["target_count"])
        assert float(sums[row, segment - 1]) == pytest.approx(value, rel=1e-5)
        total += value
    assert float(loss) == pytest.approx(total / 10, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 5, 9])
def test_chunks_change_neither_loss_nor_gradient(params, chunk):
    batch = packed()
    row_bytes = 4 * 2 * DENSE.vocab_size

    def loss(params, hidden, max_logit_bytes):
        target, weight = targets(batch)
        nll, log_z = token_losses(params, DENSE, hidden, target, max_logit_bytes)
        return jnp.sum((nll + 0.1 * log_z**2) * weight)

    hidden = jax.random.normal(jax.random.key(1), (2, 9, 8))
    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    whole, whole_grad = both(params, hidden, 10**9)
    cut, cut_grad = both(params, hidden, chunk * row_bytes)
    assert float(cut) == pytest.approx(float(whole), rel=1e-6)
    for a, b in zip(jax.tree.leaves(cut_grad), jax.tree.leaves(whole_grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_chunked_loss_never_holds_all_logits(params):
    """No array of the compiled gradient is as large as the logits of the whole batch."""
    hidden, target = jnp.ones((2, 64, 8)), jnp.ones((2, 64), jnp.int32)
    row_bytes = 4 * 2 * DENSE.vocab_size

    def loss(hidden):
        return token_nll(params, DENSE, hidden, target, max_logit_bytes=8 * row_bytes).sum()

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(hidden))
    assert "2,8,19]" in jaxpr
    assert "8,2,8,19]" not in jaxpr and "2,64,19]" not in jaxpr


def test_chunks_take_less_memory_than_the_logits_would():
    """Temporary bytes of the compiled gradient, as XLA's buffer assignment has them."""
    config = dataclasses.replace(DENSE, vocab_size=4096)
    wide = {"embed": {}, "lm_head": {"w": jnp.ones((8, 4096))}}
    hidden, target = jnp.ones((4, 128, 8)), jnp.ones((4, 128), jnp.int32)
    whole = 4 * 4 * 128 * 4096

    def temp_bytes(limit):
        def loss(params, hidden):
            return token_nll(params, config, hidden, target, max_logit_bytes=limit).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(wide, hidden).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp_bytes(whole) > whole
    assert temp_bytes(whole // 16) < 0.25 * whole


def test_z_loss_is_its_formula(params):
    batch = packed()
    plain, _ = lm_loss(params, DENSE, batch)
    loss, metrics = lm_loss(params, DENSE, batch, z_weight=0.01)
    logits = transformer.logits(
        params,
        DENSE,
        jnp.asarray(batch["tokens"]),
        positions_BT=jnp.asarray(batch["positions"]),
        segment_ids_BT=jnp.asarray(batch["segment_ids"]),
    )
    _, weight_BT = targets(batch)
    square = jax.nn.logsumexp(logits, axis=-1) ** 2
    wanted = 0.01 * float((square * weight_BT).sum() / weight_BT.sum())
    assert float(metrics["logit_z_loss"]) == pytest.approx(wanted, rel=1e-5)
    assert float(loss) == pytest.approx(float(plain) + wanted, rel=1e-5)


def test_moe_adds_balance_losses_summed_over_layers():
    batch = packed()

    @jax.jit
    def run(params):
        stats = transformer.forward(
            params,
            SPARSE,
            jnp.asarray(batch["tokens"]),
            positions_BT=jnp.asarray(batch["positions"]),
            segment_ids_BT=jnp.asarray(batch["segment_ids"]),
        ).stats
        return lm_loss(params, SPARSE, batch), stats.balance_loss

    (loss, metrics), balance_loss_L = run(init(SPARSE, jax.random.key(0)))
    assert balance_loss_L.shape == (2,)
    assert float(loss) == pytest.approx(float(metrics["nll"] + balance_loss_L.sum()), rel=1e-6)
    assert metrics["expert_count"].shape == (2, 3)
    assert float(metrics["expert_count"].sum()) == 2 * 2 * 16  # layers, routed per token, tokens


def test_a_batch_without_answers_is_zero_and_not_nan(params):
    batch = packed()
    batch["loss_mask"] = np.zeros((2, 9), np.float32)
    loss, _ = loss_of(params, DENSE, batch)
    assert float(loss) == 0.0
