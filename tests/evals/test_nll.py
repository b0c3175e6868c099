"""Held-out loss: each example's own answer tokens, whatever it was packed beside."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.data.examples import Example
from moejax.data.packing import pack
from moejax.evals import nll
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.moe.config import MoEConfig

CONFIG = ModelConfig(
    family="llama",
    vocab_size=23,
    num_layers=2,
    d_model=8,
    d_ff=16,
    num_heads=2,
    num_kv_heads=1,
    head_size=4,
    initializer_range=0.5,
)


init = jax.jit(transformer.init_params, static_argnums=0)
logits_of = jax.jit(transformer.logits, static_argnums=1)


@pytest.fixture(scope="module")
def params():
    return init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    made = []
    for number, length in enumerate([5, 9, 4, 12, 7, 6, 3]):
        mask = np.arange(length) >= length // 2
        ids = rng.integers(0, 23, length).astype(np.int32)
        made.append(Example(f"e{number}", (), ids, mask))
    return made


def alone(params, example: Example) -> tuple[float, int]:
    """The example's loss without neighbours, in rows of one length that compile once."""
    padded = np.pad(example.ids, (0, 16 - len(example.ids)))[None]
    segment_ids = (np.arange(16) < len(example.ids)).astype(np.int32)[None]
    logits = np.asarray(logits_of(params, CONFIG, padded, segment_ids_BT=segment_ids))[0]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counted = [t for t in range(1, len(example.ids)) if example.loss_mask[t]]
    return -sum(log_p[t - 1, example.ids[t]] for t in counted), len(counted)


def test_each_example_gets_what_it_has_alone(params, examples):
    packed = pack(examples, 16)
    result = nll.evaluate(params, CONFIG, packed, batch_size=2)
    assert sorted(result.ids) == [example.id for example in examples]
    for name, total, count in zip(result.ids, result.sums, result.counts, strict=True):
        wanted, num = alone(params, examples[int(name[1:])])
        assert count == num
        np.testing.assert_allclose(total, wanted, rtol=1e-5)
    assert result.num_tokens == packed.stats.num_answer_tokens
    interval = result.interval()
    assert interval.mean == pytest.approx(result.sums.sum() / result.counts.sum())


def test_the_batch_size_does_not_matter(params, examples):
    packed = pack(examples, 16)
    two, four = (nll.evaluate(params, CONFIG, packed, batch_size=size) for size in (2, 4))
    np.testing.assert_allclose(two.sums, four.sums, rtol=1e-6)
    assert (two.ids, two.tokens) == (four.ids, four.tokens)


def test_progress_reaches_the_end(params, examples):
    seen = []
    packed = pack(examples, 16)
    nll.evaluate(params, CONFIG, packed, batch_size=2, progress=lambda *pair: seen.append(pair))
    total = -(-packed.stats.num_rows // 2)
    assert seen == [(i, total) for i in range(1, total + 1)]


def test_a_run_goes_on_from_what_it_kept(params, examples, monkeypatch):
    packed, kept, seen = pack(examples, 16), [], []
    whole = nll.evaluate(params, CONFIG, packed, batch_size=2, on_records=kept.append)
    assert [record for new in kept for record in new] == whole.records()
    compute = nll._example_nll
    monkeypatch.setattr(nll, "_example_nll", lambda *args: seen.append(1) or compute(*args))
    again = nll.evaluate(params, CONFIG, packed, batch_size=2, done=kept[0])
    assert len(seen) == len(kept) - 1
    assert again.records() == whole.records() and np.array_equal(again.sums, whole.sums)


def test_models_are_compared_on_the_same_tokens_only(params, examples):
    packed = pack(examples, 16)
    first = nll.evaluate(params, CONFIG, packed)
    worse = dataclasses.replace(first, sums=first.sums + first.counts)
    difference = worse.minus(first)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((1, 1, 1))
    assert first.minus(first).mean == 0
    with pytest.raises(ValueError, match="different tokens"):
        first.minus(nll.evaluate(params, CONFIG, pack(examples[:-1], 16)))
    changed = [*examples[:-1], dataclasses.replace(examples[-1], ids=examples[-1].ids + 1)]
    assert nll.tokens_hash(pack(changed, 16)) != first.tokens


def test_a_mixture_of_experts_is_judged_by_its_loss_without_balance_terms(examples):
    config = dataclasses.replace(CONFIG, num_layers=1, moe=MoEConfig(num_experts=4, top_k=3))
    params = init(config, jax.random.key(1))
    packed = pack(examples, 16)
    result = nll.evaluate(params, config, packed)
    again = nll.evaluate(params, config, packed)
    np.testing.assert_array_equal(result.sums, again.sums)  # no noise
    assert np.isfinite(result.sums).all() and (result.counts > 0).all()


def test_records_are_plain(params, examples):
    result = nll.evaluate(params, CONFIG, pack(examples, 16))
    assert result.records()[0].keys() == {"id", "nll_sum", "num_tokens"}
    assert type(result.records()[0]["nll_sum"]) is float
