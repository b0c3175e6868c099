"""Laws of masks: all ones is the dense model; lists and masks are inverse; order is no change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.methods import shadow_mask as masks
from moejax.methods import shadow_predictor as predictors
from moejax.methods.shadow_order import inverse, reordered
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.models.masked import mask_experts
from moejax.moe.config import MoEConfig

LLAMA = ModelConfig("llama", 61, 3, 32, 48, 4, 2, 8)
OPT = dataclasses.replace(LLAMA, gated=False, activation="relu", mlp_bias=True, num_kv_heads=4)
MOE = dataclasses.replace(LLAMA, moe=MoEConfig(4, 2))
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 61)


def params_of(config):
    return transformer.init_params(
        dataclasses.replace(config, initializer_range=0.2), jax.random.key(0)
    )


def logits(params, config, tokens=TOKENS, inserted=None):
    """In one program: op by op takes a compilation each."""
    return jax.jit(lambda p: transformer.logits(p, config, tokens, inserted=inserted))(params)


def random_scores(sizes, *lead):
    draw = np.random.default_rng(0)
    shapes = [(*lead, sizes.num_layers, n) for n in (sizes.heads, sizes.blocks)]
    return masks.Mask(*(jnp.asarray(draw.random(shape)) for shape in shapes))


@pytest.mark.parametrize(
    ("config", "split"), [(LLAMA, False), (OPT, True)], ids=["llama", "opt_split"]
)
def test_all_ones_is_the_dense_model_bit_for_bit(config, split):
    params = params_of(config)
    params = transformer.split_layers(params) if split else params
    sizes = masks.sizes_of(config, 8)
    ones = masks.inserted_of(masks.full_mask(sizes), config, sizes)
    dense = logits(params, config)
    assert np.array_equal(logits(params, config, inserted=ones), dense)


def test_experts_masks_by_weights_and_inside_agree():
    params, sizes = params_of(MOE), masks.sizes_of(MOE, 8)
    dense = logits(params, MOE)
    ones = masks.per_neuron(masks.full_mask(sizes), MOE, sizes)
    assert np.array_equal(logits(mask_experts(params, MOE, ones), MOE), dense)
    mask = masks.select(random_scores(sizes), sizes, (0.0, 0.5))
    cut = mask_experts(params, MOE, masks.per_neuron(mask, MOE, sizes))
    by_weights = logits(cut, MOE)
    inside = logits(params, MOE, inserted=masks.inserted_of(mask, MOE, sizes))
    np.testing.assert_allclose(inside, by_weights, rtol=1e-5, atol=1e-5)
    assert np.abs(by_weights - dense).max() > 1e-2


def test_a_mask_is_the_model_without_those_weights():
    """Each row under its own mask, against weights cut out by hand."""
    params, sizes = params_of(LLAMA), masks.sizes_of(LLAMA, 8, "group")
    mask = masks.select(random_scores(sizes, 2), sizes, 0.5)
    got = logits(params, LLAMA, inserted=masks.inserted_of(mask, LLAMA, sizes))
    for row in range(2):
        cut = jax.tree.map(np.array, params)
        layers = cut["layers"]["0"]
        layers["attn"]["w_o"] *= np.repeat(mask.heads[row], 2, -1)[:, :, None, None]
        layers["mlp"]["w_down"] *= np.repeat(mask.blocks[row], 8, -1)[:, :, None]
        want = logits(cut, LLAMA, TOKENS[row : row + 1])
        np.testing.assert_allclose(got[row : row + 1], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_lists_and_masks_are_inverse(lead):
    sizes = masks.sizes_of(LLAMA, 8)
    mask = masks.select(random_scores(sizes, *lead), sizes, 0.3)
    kept = masks.kept_of(mask, sizes)
    assert kept.heads.shape == (*lead, 2, 3) and kept.blocks.shape == (*lead, 2, 5)
    assert jax.tree.all(jax.tree.map(np.array_equal, masks.mask_of(kept, sizes), mask))


def test_budgets():
    sizes = dataclasses.replace(masks.sizes_of(LLAMA, 8), block=256)
    scores = masks.Mask(jnp.ones((3, 4)) * jnp.array([[9], [1], [2]]), jnp.ones((3, 6)))
    scores = dataclasses.replace(scores, blocks=scores.blocks * jnp.array([[9], [1], [2]]))
    counts = {b: masks.select(scores, sizes, 0.5, b).heads.sum(-1).tolist() for b in masks.BUDGETS}
    assert counts == {"local": [4, 2, 2], "global": [4, 0, 4], "hybrid": [4, 1, 3]}
    blocks = masks.select(scores, sizes, (0.0, 0.5), "hybrid").blocks.sum(-1).tolist()
    assert blocks == [6, 1, 5]
    assert masks.num_kept(10, 0.7) == 3 and masks.num_kept(9, 0.5) == 5


@pytest.mark.parametrize("config", [LLAMA, OPT, MOE], ids=["llama", "opt", "moe"])
def test_neurons_in_another_order_are_the_same_model(config):
    params, draw = params_of(config), np.random.default_rng(0)
    params = jax.tree.map(
        lambda w: w + 0.1 * draw.standard_normal(w.shape).astype("float32"), params
    )
    shape = (3, 4, 48) if config.moe else (3, 48)
    order = np.argsort(draw.random(shape), -1)
    moved = reordered(params, config, order)
    want = logits(params, config)
    np.testing.assert_allclose(logits(moved, config), want, rtol=1e-4, atol=1e-4)
    back = reordered(moved, config, inverse(order))
    assert jax.tree.all(jax.tree.map(np.array_equal, back, params))


def test_predictor_folder_round_trip_and_refusals(tmp_path):
    sizes = masks.sizes_of(LLAMA, 8)
    static = random_scores(sizes)
    params = predictors.init(jax.random.key(0), 32, 16, static)
    context = jax.random.normal(jax.random.key(2), (2, 32))
    at_start = predictors.predict(params, context, sizes)
    np.testing.assert_allclose(at_start.blocks[1], static.blocks, rtol=1e-6)
    info = predictors.PredictorInfo(
        "ab" * 32, predictors.fields_of(LLAMA), sizes, "plainact", "unified", 16
    )
    order = np.tile(np.arange(48), (3, 1))
    predictors.save(tmp_path / "p", predictors.Predictor(info, params, order, static))
    read = predictors.load(tmp_path / "p", LLAMA, "ab" * 32)
    assert read.info == info
    assert all(np.array_equal(read.params[name], params[name]) for name in params)
    deeper = dataclasses.replace(LLAMA, num_layers=4)
    with pytest.raises(InputError, match="num_layers is 3, this model's 4"):
        predictors.load(tmp_path / "p", deeper)
    with pytest.raises(InputError, match="other weights"):
        predictors.load(tmp_path / "p", LLAMA, "cd" * 32)
    with pytest.raises(InputError, match=r"no shadow\.json"):
        predictors.load(tmp_path, LLAMA)


def test_bad_input_is_one_line():
    sizes = masks.sizes_of(LLAMA, 8)
    scores = random_scores(sizes)
    for sparsity in (1.0, -0.1, float("nan")):
        with pytest.raises(InputError, match="outside"):
            masks.select(scores, sizes, sparsity)
    nan = dataclasses.replace(scores, heads=scores.heads.at[1, 2].set(jnp.nan))
    with pytest.raises(InputError, match=r"NaN among the scores of heads, the first at \[1, 2\]"):
        masks.select(nan, sizes, 0.5)
    with pytest.raises(InputError, match="do not divide"):
        masks.sizes_of(LLAMA, 7)
    with pytest.raises(InputError, match="fixed length"):
        masks.kept_of(masks.select(scores, sizes, 0.5, "global"), sizes)
