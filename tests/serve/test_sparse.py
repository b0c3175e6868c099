"""Decoding that skips heads and neurons, against the masked model over the same texts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core.errors import InputError
from moejax.core.precision import TOLERANCE
from moejax.methods import shadow_decode as decode
from moejax.methods import shadow_dejavu
from moejax.methods import shadow_mask as masks
from moejax.methods import shadow_predictor as predictors
from moejax.methods.shadow_order import reordered
from moejax.models import transformer
from moejax.models.cache import init_cache
from moejax.models.config import AttentionConfig, ModelConfig
from moejax.models.inserted import Inserted
from moejax.models.masked import one_neuron_shape
from moejax.models.mla import MLAConfig
from moejax.moe.config import MoEConfig
from moejax.serve import sparse

LLAMA = ModelConfig("llama", 61, 3, 32, 48, 4, 2, 8, initializer_range=0.2)
OPT = dataclasses.replace(
    LLAMA, gated=False, activation="relu", mlp_bias=True, attention_bias=True, num_kv_heads=4
)
NORMED = dataclasses.replace(LLAMA, attention=AttentionConfig(qk_norm="all"))
MOE = dataclasses.replace(LLAMA, moe=MoEConfig(4, 2))
LATENT = dataclasses.replace(
    LLAMA,
    num_kv_heads=4,
    head_size=10,
    mla=MLAConfig(kv_rank=12, q_rank=None, nope_size=6, rope_size=4, v_size=8),
)
DEEPSEEK = dataclasses.replace(
    LATENT, moe=MoEConfig(4, 2, shared_ffn=16, expert_ffn=24), num_dense_layers=1
)
CASES = {
    "deepseek": (DEEPSEEK, "query"),
    "latent": (LATENT, "query"),
    "latent_low_rank": (
        dataclasses.replace(LATENT, mla=dataclasses.replace(LATENT.mla, q_rank=14)),
        "query",
    ),
    "opt": (OPT, "query"),
    "gqa_groups": (LLAMA, "group"),
    "gqa_heads": (LLAMA, "query"),  # as many kept heads as groups: each reads its own
    "mqa_heads": (dataclasses.replace(LLAMA, num_kv_heads=1), "query"),  # more: all are read
    "norm_of_all_heads": (NORMED, "group"),
    "experts": (MOE, "group"),
}
PROMPTS = [[5, 17, 3, 60, 8, 1, 44], [9, 2, 2, 31]]
HALF, FEW = (0.5, 0.5), (0.75, 0.7)  # of FEW two rows together leave something out


@functools.cache
def model_of(case, refresh_every=0, sparsity=HALF):
    config, unit = CASES[case]
    params = transformer.init_params(config, jax.random.key(0))
    biases = jax.random.split(jax.random.key(7), 64)

    def moved(path, w):  # biases that are not zero
        name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")[2]
        key = biases[sum(map(ord, name)) % 64]
        return 0.3 * jax.random.normal(key, w.shape) if name.startswith("b_") else w

    params = jax.tree_util.tree_map_with_path(moved, params)
    sizes = masks.sizes_of(config, 8, unit)
    draw = np.random.default_rng(0)
    shapes = [(sizes.num_layers, n) for n in (sizes.heads, sizes.blocks)]
    static = masks.Mask(*(jnp.asarray(draw.random(s), jnp.float32) for s in shapes))
    predictor = predictors.init(jax.random.key(3), config.num_heads * 8, 16, static)
    for name in ("w_out_heads", "w_out_blocks"):  # inputs matter
        predictor[name] = jax.random.normal(jax.random.key(4), predictor[name].shape)
    policy = sparse.Policy(sizes, sparsity, refresh_every)
    laid_out = decode.lay_out(params, config, sizes)
    return params, sparse.Sparse(config, laid_out, policy, predictor, static)


@functools.cache
def asking(case, sparsity=HALF):
    """(params in the order of blocks, a model whose layers decide, the masked way to do so)."""
    params, model = model_of(case, 0, sparsity)
    config, sizes, draw = model.config, model.policy.sizes, np.random.default_rng(2)
    shape = one_neuron_shape(config)
    rows = [draw.permutation(shape[-1]) for _ in range(sizes.num_layers * int(np.prod(shape[:-1])))]
    order = np.stack(rows).reshape(sizes.num_layers, *shape).astype(np.int32)

    def drawn(units):
        shapes = {"w_1": (config.d_model, 5), "w_2": (5, units)}
        made = {n: draw.standard_normal((sizes.num_layers, *s)) for n, s in shapes.items()}
        return {n: 0.5 * w.astype(np.float32) for n, w in made.items()}

    dejavu = {"heads": drawn(config.num_heads), "neurons": drawn(int(np.prod(shape)))}
    info = predictors.PredictorInfo(
        "ab" * 32, predictors.fields_of(config), sizes, "labels", "dejavu", 5
    )
    predictor = predictors.Predictor(info, dejavu, order, model.static)
    ready = sparse.ready(params, config, predictor, model.policy)
    index = shadow_dejavu.in_order(order, sizes)
    masking = shadow_dejavu.deciding(
        dejavu, config, index, sizes, shadow_dejavu.kept(sizes, sparsity)
    )
    return reordered(params, config, order), ready, masking, predictor


def masked_text(params, model, prompt, num_tokens):
    """Greedy text of the masked path: the prompt dense, then a mask, made anew where asked for."""
    config, policy = model.config, model.policy
    split = transformer.split_layers(params)
    cache = init_cache(config, jnp.zeros(1, jnp.int32), len(prompt) + num_tokens, split=True)
    mask, ids, found, tokens = None, [], [], list(prompt)
    for step in range(num_tokens + 1):
        contexts = []
        masking = None if mask is None else masks.inserted_of(mask, config, policy.sizes)

        def heads(part, x, masking=masking, contexts=contexts):
            contexts.append(x[:, -1].reshape(1, -1))
            return x if masking is None else masking.heads(part, x)[0], None

        inserted = dataclasses.replace(masking or Inserted(), heads=heads)
        new = jnp.asarray([tokens])
        out = transformer.forward(split, config, new, cache=cache, inserted=inserted)
        cache, logits = out.cache, transformer.unembed(split, config, out.hidden_BTD[0, -1])
        if step == 0 or (policy.refresh_every and step % policy.refresh_every == 0):
            scores = predictors.predict(model.predictor, contexts[0], policy.sizes)
            mask = masks.select(jax.tree.map(lambda x: x[0], scores), policy.sizes, HALF)
        tokens = [int(jnp.argmax(logits))]
        ids += tokens
        found.append(logits)
    return ids[:num_tokens], np.stack(found[:num_tokens])


def close(got, wanted):
    bound = TOLERANCE["float32"] * np.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("case", "refresh"),
    [
        ("opt", 0),
        ("gqa_groups", 3),
        ("experts", 0),
        ("deepseek", 3),
        pytest.param("latent", 3, marks=pytest.mark.slow),
        pytest.param("latent_low_rank", 0, marks=pytest.mark.slow),
        pytest.param("gqa_groups", 0, marks=pytest.mark.slow),
        ("gqa_heads", 3),
        pytest.param("mqa_heads", 3, marks=pytest.mark.slow),
        pytest.param("norm_of_all_heads", 0, marks=pytest.mark.slow),
    ],
)
def test_the_fast_path_is_the_masked_model(case, refresh):
    """Also where the mask changes on the way: keys and values of skipped heads are there."""
    params, model = model_of(case, refresh)
    (answer,) = sparse.generate(model, PROMPTS[:1], 6, with_logits=True)
    ids, logits = masked_text(params, model, PROMPTS[0], 6)
    assert answer.ids == ids
    close(answer.logits_TV, logits)
    dense = dataclasses.replace(model, policy=dataclasses.replace(model.policy, sparsity=None))
    (whole,) = sparse.generate(dense, PROMPTS[:1], 6, with_logits=True)
    assert np.abs(whole.logits_TV[1:] - answer.logits_TV[1:]).max() > 0.1


@pytest.mark.parametrize(
    ("case", "sparsity"),
    [
        ("opt", FEW),
        ("deepseek", HALF),
        pytest.param("opt", HALF, marks=pytest.mark.slow),
        pytest.param("gqa_groups", HALF, marks=pytest.mark.slow),
        pytest.param("gqa_heads", HALF, marks=pytest.mark.slow),
        pytest.param("gqa_heads", FEW, marks=pytest.mark.slow),
        pytest.param("latent", FEW, marks=pytest.mark.slow),
        pytest.param("norm_of_all_heads", HALF, marks=pytest.mark.slow),
        pytest.param("experts", FEW, marks=pytest.mark.slow),
    ],
)
def test_layers_that_decide_are_the_masked_model(case, sparsity):
    """DejaVu's predictors, one row and two: each reads what it keeps, at every token anew."""
    params, model, masking, _ = asking(case, sparsity)
    together = sparse.generate(model, PROMPTS, 6, with_logits=True)
    split = transformer.split_layers(params)
    for prompt, row in zip(PROMPTS, together, strict=True):
        (answer,) = sparse.generate(model, [prompt], 6, with_logits=True)
        cache = init_cache(model.config, jnp.zeros(1, jnp.int32), len(prompt) + 6, split=True)
        tokens, found = prompt, []
        for step in range(6):
            inserted = masking if step else None
            new = jnp.asarray([tokens])
            out = transformer.forward(split, model.config, new, cache=cache, inserted=inserted)
            cache = out.cache
            found.append(transformer.unembed(split, model.config, out.hidden_BTD[0, -1]))
            tokens = answer.ids[step : step + 1]
        assert answer.ids == np.stack(found).argmax(-1).tolist() == row.ids
        close(answer.logits_TV, np.stack(found))
        close(row.logits_TV, np.stack(found))
    dense = dataclasses.replace(model, policy=dataclasses.replace(model.policy, sparsity=None))
    (whole,) = sparse.generate(dense, PROMPTS[:1], 6, with_logits=True)
    (answer,) = sparse.generate(model, PROMPTS[:1], 6, with_logits=True)
    assert np.abs(whole.logits_TV[1:] - answer.logits_TV[1:]).max() > 0.1


@pytest.mark.parametrize(
    ("case", "sparsity"),
    [
        ("gqa_heads", FEW),
        pytest.param("gqa_heads", HALF, marks=pytest.mark.slow),
        pytest.param("opt", HALF, marks=pytest.mark.slow),
        pytest.param("deepseek", FEW, marks=pytest.mark.slow),
        pytest.param("experts", HALF, marks=pytest.mark.slow),
    ],
)
def test_a_predictor_asked_for_the_token_itself_is_the_masked_model(case, sparsity):
    """One row and two; each token's mask is of what layer 0 mixes at that token."""
    params, model = model_of(case, 0, sparsity)
    config, sizes = model.config, model.policy.sizes
    model = dataclasses.replace(model, at_token=True)
    together = sparse.generate(model, PROMPTS, 6, with_logits=True)
    masks_of = set()
    for prompt, row in zip(PROMPTS, together, strict=True):
        (answer,) = sparse.generate(model, [prompt], 6, with_logits=True)
        text = jnp.asarray([[*prompt, *answer.ids]])
        watch = Inserted(heads=lambda _, x: (x, x))
        seen = transformer.forward(params, config, text, inserted=watch).seen
        context = seen[config.runs[0].name]["heads"][0].reshape(1, text.shape[1], -1)
        scores = predictors.predict(model.predictor, context, sizes)
        mask = masks.select(scores, sizes, sparsity)
        masks_of |= {np.asarray(m).tobytes() for m in mask.blocks[0]}

        def later(m, prompt=prompt):  # the prompt is read densely
            return jnp.where(jnp.arange(m.shape[1])[:, None, None] < len(prompt), True, m)

        inserted = masks.inserted_of(jax.tree.map(later, mask), config, sizes)
        wanted = transformer.logits(params, config, text, inserted=inserted)
        wanted = np.asarray(wanted)[0, len(prompt) - 1 : -1]
        assert answer.ids == wanted.argmax(-1).tolist() == row.ids
        close(answer.logits_TV, wanted)
        close(row.logits_TV, wanted)
    assert len(masks_of) > len(PROMPTS)  # they change on the way
    one, two = (sparse.decide(model, jnp.zeros((rows, 32))).lengths for rows in (1, 2))
    assert one == sizes.kept(sparsity)
    assert two == (min(2 * one[0], sizes.heads), min(2 * one[1], sizes.blocks))


def test_layers_that_decide_read_less_and_need_no_interval():
    _, model, _, predictor = asking("opt")
    sizes, config = model.policy.sizes, model.config
    plan = sparse.decide(model, jnp.zeros((1, 32)))
    asked = sum(w.nbytes for w in jax.tree.leaves(model.asked))
    # w_1 and w_2 of both predictors, of the layers after the first
    assert asked == (sizes.num_layers - sizes.first) * 4 * 5 * (2 * 32 + 4 + 48)
    listed = dataclasses.replace(model, policy=dataclasses.replace(model.policy, predicted=False))
    static = sparse.decide(listed, jnp.zeros((1, 32)))
    assert plan.lengths == static.lengths == (2, 3)
    bytes_of = functools.partial(decode.num_read_bytes, model.params, config)
    assert bytes_of(plan, sizes=sizes) == bytes_of(static, sizes=sizes) + asked
    often = dataclasses.replace(model.policy, refresh_every=2)
    with pytest.raises(InputError, match="decide at every token: leave out"):
        sparse.ready(model.params, config, predictor, often)


def test_a_refresh_after_more_tokens_than_are_drawn_at_a_time(monkeypatch):
    _, model = model_of("gqa_groups", 3)
    (wanted,) = sparse.generate(model, PROMPTS[:1], 8, with_logits=True)
    monkeypatch.setattr(sparse, "CHUNK", 2)
    drawn, advance = [], sparse.advance

    def watched(model, state, plan, keys, sampling):
        drawn.append(len(keys))
        return advance(model, state, plan, keys, sampling)

    monkeypatch.setattr(sparse, "advance", watched)
    (found,) = sparse.generate(model, PROMPTS[:1], 8, with_logits=True)
    assert drawn == [2, 1, 2, 1, 2] and found.ids == wanted.ids
    close(found.logits_TV, wanted.logits_TV)


def test_a_refresh_changes_the_mask():
    _, model = model_of("gqa_groups", 3)
    state = sparse.start(model, PROMPTS[:1], 8)
    before = sparse.decide(model, state.context_BE)
    keys = jnp.zeros((3, 1), jnp.uint32)
    state, _, _ = sparse.advance(model, state, before, keys)
    after = sparse.decide(model, state.context_BE)
    assert not np.array_equal(before.kept.blocks, after.kept.blocks)


@pytest.mark.parametrize("case", ["opt", pytest.param("experts", marks=pytest.mark.slow)])
def test_rows_of_a_batch_are_the_rows_alone(case):
    """The union of what two rows keep, each row under its own factors."""
    _, model = model_of(case, 4)
    together = sparse.generate(model, PROMPTS, 6, with_logits=True)
    state = sparse.start(model, PROMPTS, 6)
    plan = sparse.decide(model, state.context_BE)
    assert plan.blocks_BLK.shape[0] == 2
    assert not np.array_equal(plan.blocks_BLK[0], plan.blocks_BLK[1])
    for prompt, row in zip(PROMPTS, together, strict=True):
        (alone,) = sparse.generate(model, [prompt], 6, with_logits=True)
        assert alone.ids == row.ids
        close(row.logits_TV, alone.logits_TV)


@pytest.mark.slow
def test_nothing_skipped_is_the_dense_model():
    params, model = model_of("opt", 0, (0.0, 0.0))
    (answer,) = sparse.generate(model, PROMPTS[:1], 6, with_logits=True)
    text = [*PROMPTS[0], *answer.ids]
    wanted = transformer.logits(params, model.config, jnp.asarray([text]))
    close(answer.logits_TV, np.asarray(wanted)[0, len(PROMPTS[0]) - 1 : -1])


def test_lists_on_the_device_are_those_of_the_mask():
    sizes = masks.sizes_of(LLAMA, 8)
    draw = np.random.default_rng(1)
    shapes = [(2, sizes.num_layers, n) for n in (sizes.heads, sizes.blocks)]
    scores = masks.Mask(*(jnp.asarray(draw.integers(0, 3, s), jnp.float32) for s in shapes))
    wanted = masks.kept_of(masks.select(scores, sizes, (0.25, 0.4)), sizes)
    got = decode.kept_by_scores(scores, sizes, (0.25, 0.4))
    assert np.array_equal(got.heads, wanted.heads) and np.array_equal(got.blocks, wanted.blocks)
