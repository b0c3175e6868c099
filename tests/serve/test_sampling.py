"""Sampling draws from exactly the distribution that its formulas name, row by row."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.serve import sampling
from moejax.serve.sampling import SamplingConfig


def reference_probs(logits_V: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """The definition, by sorting, in float64: temperature, top-k, top-p, min-p."""
    scaled = logits_V.astype(np.float64) / config.temperature
    order = np.lexsort((np.arange(len(scaled)), -scaled))  # likeliest first, then lower id
    probs = np.exp(scaled - scaled.max())
    kept = np.ones(len(scaled), bool)
    if config.top_k:
        kept[order[config.top_k :]] = False
    probs = np.where(kept, probs, 0) / probs[kept].sum()
    if config.top_p < 1:
        mass_before = np.cumsum(probs[order]) - probs[order]
        kept[order[mass_before >= config.top_p]] = False
    kept &= probs >= config.min_p * probs.max()
    probs = np.where(kept, probs, 0)
    return probs / probs.sum()


def drawn_from(logits_BV, config: SamplingConfig) -> np.ndarray:
    filter_logits = jax.jit(sampling.filter_logits, static_argnums=1)
    return np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(logits_BV), config), -1))


def row_keys(seed: int, num_rows: int):
    rows = jnp.arange(num_rows)
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(rows)


@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p",
    list(itertools.product((0.3, 2.5), (0, 1, 7, 300), (0.05, 0.83, 1.0), (0.0, 0.11))),
)
def test_distribution_is_the_formulas(temperature, top_k, top_p, min_p):
    config = SamplingConfig(temperature, top_k, top_p, min_p)
    logits_BV = np.random.default_rng(0).normal(0, 2, (5, 211)).astype(np.float32)
    probs_BV = drawn_from(logits_BV, config)
    for logits_V, probs_V in zip(logits_BV, probs_BV, strict=True):
        expected_V = reference_probs(logits_V, config)
        np.testing.assert_array_equal(probs_V > 0, expected_V > 0)
        np.testing.assert_allclose(probs_V, expected_V, rtol=2e-5, atol=1e-9)


def test_cuts_apply_in_document_order():
    # After top-k of 2 the first token holds 2/3 of the mass, so top-p of 0.6 keeps it alone;
    # the other order would have kept two.
    logits_BV = np.log(np.array([[0.4, 0.2, 0.2, 0.1, 0.1]], np.float32))
    config = SamplingConfig(temperature=1.0, top_k=2, top_p=0.6)
    np.testing.assert_allclose(drawn_from(logits_BV, config), [[1, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    "config, kept",
    [
        (SamplingConfig(1.0, top_k=2), [1, 2]),
        (SamplingConfig(1.0, top_k=3), [1, 2, 4]),
        (SamplingConfig(1.0, top_p=0.5), [1, 2]),
        (SamplingConfig(1.0, top_p=0.51), [1, 2, 4]),
        (SamplingConfig(1.0, min_p=1.0), [1, 2, 4, 5]),
    ],
)
def test_ties_keep_the_lower_ids(config, kept):
    logits_BV = np.array([[-9.0, 3.0, 3.0, -9.0, 3.0, 3.0]], np.float32)
    # The two unlikely tokens hold 3e-6 of the mass each: push them out of the arithmetic.
    logits_BV[logits_BV < 0] = -200.0
    probs_V = drawn_from(logits_BV, config)[0]
    assert np.flatnonzero(probs_V).tolist() == kept
    np.testing.assert_allclose(probs_V[kept], 1 / len(kept), rtol=1e-6)


def test_greedy_is_argmax_and_takes_the_lower_of_two_equals():
    logits_BV = jnp.array([[0.0, 5.0, 5.0], [7.0, -1.0, 7.0]])
    assert sampling.sample(logits_BV, row_keys(0, 2), SamplingConfig()).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
def test_tiny_temperature_is_greedy(temperature):
    logits_BV = jnp.array([[1.0, 80.0, -3.0, 79.0]] * 4)
    drawn = sampling.sample(logits_BV, row_keys(0, 4), SamplingConfig(temperature))
    assert drawn.tolist() == [1] * 4


def test_frequencies_match_the_distribution():
    config = SamplingConfig(temperature=1.3, top_k=9, top_p=0.95, min_p=0.02)
    logits_V = np.random.default_rng(3).normal(0, 1.5, 40).astype(np.float32)
    num_draws = 20_000
    drawn = jax.jit(lambda x, k: sampling.sample(x, k, config))(
        jnp.broadcast_to(logits_V, (num_draws, 40)), row_keys(7, num_draws)
    )
    counts = np.bincount(np.asarray(drawn), minlength=40)
    expected = reference_probs(logits_V, config) * num_draws
    support = expected > 0
    assert counts[~support].sum() == 0
    chi_square = ((counts - expected)[support] ** 2 / expected[support]).sum()
    freedom = support.sum() - 1
    assert freedom >= 4
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "config",
    [SamplingConfig(), SamplingConfig(0.9), SamplingConfig(0.9, top_k=12, top_p=0.8, min_p=0.01)],
)
def test_a_row_does_not_depend_on_its_neighbours(config):
    logits_BV = jax.random.normal(jax.random.key(1), (6, 97)) * 2
    keys_B = row_keys(5, 6)
    together = sampling.sample(logits_BV, keys_B, config)
    alone = [
        sampling.sample(logits_BV[i : i + 1], keys_B[i : i + 1], config)[0].item() for i in range(6)
    ]
    assert together.tolist() == alone
    order = jnp.array([4, 1, 5, 0, 3, 2])
    shuffled = sampling.sample(logits_BV[order], keys_B[order], config)
    assert shuffled.tolist() == together[order].tolist()


def test_another_key_gives_another_draw():
    logits_BV = jnp.zeros((64, 1000))
    first = sampling.sample(logits_BV, row_keys(0, 64), SamplingConfig(1.0))
    second = sampling.sample(logits_BV, row_keys(1, 64), SamplingConfig(1.0))
    assert (first != second).sum() > 55
    assert len(set(first.tolist())) > 55


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.5),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(InputError, match=rf"{field} must be .*got {value}") as error:
        SamplingConfig(**{field: value})
    assert "\n" not in str(error.value)
