"""DejaVu's predictors: what they learn from, and deciding at every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.methods import shadow_dejavu, shadow_mask, shadow_metrics
from moejax.models import transformer
from moejax.models.config import ModelConfig
from moejax.models.inserted import Inserted
from moejax.models.masked import one_neuron_shape
from moejax.moe.config import MoEConfig

LLAMA = ModelConfig("llama", 61, 2, 32, 48, 4, 2, 8, initializer_range=0.2)
OPT = dataclasses.replace(LLAMA, gated=False, activation="relu", mlp_bias=True)
MOE = dataclasses.replace(LLAMA, moe=MoEConfig(4, 2))
TOKENS = jnp.array([[1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 9, 1]])
SIZES = shadow_mask.Sizes(2, 4, 6, 3)


def drawn(shape, units, hidden=5):
    draw = np.random.default_rng(1)
    params = {"w_1": draw.standard_normal((2, 32, hidden)) * 0.5}
    params["w_2"] = draw.standard_normal((2, hidden, units)) * shape
    return {name: jnp.asarray(w, jnp.float32) for name, w in params.items()}


def keep_largest(scores, keep):
    """bool: the `keep` largest of the last dim, by sorting."""
    rank = np.argsort(np.argsort(-scores, axis=-1), axis=-1)
    return rank < keep


@pytest.mark.parametrize("config, unit", [(LLAMA, "query"), (LLAMA, "group"), (OPT, "query"),
                                          (MOE, "query")])  # fmt: skip
@pytest.mark.parametrize("place", ["heads", "neurons"])
def test_every_token_decides_by_what_it_has_there(config, unit, place):
    """Of the last layer alone, whose inputs a pass without masks says, by hand for every token."""
    sizes = shadow_mask.sizes_of(config, 8, unit)
    params = transformer.init_params(config, jax.random.key(0))
    shape = one_neuron_shape(config)
    draw = np.random.default_rng(0)
    rows = [draw.permutation(shape[-1]) for _ in range(2 * int(np.prod(shape[:-1])))]
    order = np.stack(rows).reshape(2, *shape)
    neurons = int(np.prod(shape))
    dejavu = {"heads": drawn(0.6, config.num_heads), "neurons": drawn(0.6, neurons)}
    watch = Inserted(attn_in=lambda part, x: (x, x), mlp_in=lambda part, x: (x, x))

    out = jax.jit(lambda p: transformer.forward(p, config, TOKENS, inserted=watch).seen)(params)
    (seen,) = out.values()
    w = {name: np.asarray(v[1], np.float64) for name, v in dejavu[place].items()}
    x = np.asarray(seen[shadow_dejavu.INPUT[place]][1], np.float64)
    scores = 1 / (1 + np.exp(-(x @ w["w_1"] @ w["w_2"])))
    if place == "neurons":
        index = shadow_dejavu.in_order(order, sizes)[1]
        assert sorted(index) == list(range(neurons))
        scores = scores[..., index]
    units = getattr(sizes, "heads" if place == "heads" else "blocks")
    summed = scores.reshape(*scores.shape[:-1], units, -1).sum(-1)
    mask = keep_largest(summed, units // 2)
    mask = np.repeat(mask, scores.shape[-1] // units, axis=-1)
    assert len({row.tobytes() for row in mask.reshape(-1, mask.shape[-1])}) > 1  # not one for all
    mask = mask[..., None] if place == "heads" else mask.reshape(*TOKENS.shape, *shape)
    both = jnp.stack([jnp.ones(mask.shape), jnp.asarray(mask, jnp.float32)])
    by_hand = Inserted(
        **{place: lambda part, x: (x * part, None)},
        layers={config.runs[0].name: both},
    )
    shares = (0.5, 0.0) if place == "heads" else (0.0, 0.5)
    deciding, nothing = (
        shadow_dejavu.deciding(
            *(dejavu, config, shadow_dejavu.in_order(order, sizes), sizes),
            shadow_dejavu.kept(sizes, s),
        )
        for s in (shares, (0.0, 0.0))
    )
    found = [
        jax.jit(lambda p, i=i: transformer.logits(p, config, TOKENS, inserted=i))(params)
        for i in (by_hand, deciding, nothing, None)
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[2], found[3], rtol=1e-4, atol=1e-5)
    assert np.abs(found[1] - found[3]).max() > 1e-2


def test_they_learn_labels_and_sum_over_blocks():
    draw = np.random.default_rng(0)
    inputs = draw.standard_normal((2, 300, 10)).astype(np.float32)
    planes = draw.standard_normal((2, 10, 18))
    values = np.einsum("lrd,ldu->lru", inputs, planes)
    wanted = shadow_dejavu.labels(values, zeros=False)
    assert (wanted.sum(-1) == 5).all() and shadow_dejavu.labels(values, True).mean() < 0.6
    how = shadow_dejavu.DejavuConfig(hidden=12, epochs=15, batch_size=50, lr_scale=5)
    told = []
    params = {
        "heads": shadow_dejavu.fit(inputs, wanted[..., :4], "heads", how),
        "neurons": shadow_dejavu.fit(inputs, wanted, "neurons", how, lambda *a: told.append(a)),
    }
    assert [t[0] for t in told] == list(range(15)) and told[-1][1] < told[0][1]
    loss = shadow_dejavu.loss_of(params["neurons"], inputs, wanted, "neurons")
    assert abs(loss - told[-1][1]) < 0.1 * told[-1][1]
    order = np.stack([draw.permutation(18) for _ in range(2)])
    signal = {"attn_in": inputs[:, :20], "mlp_in": inputs[:, :20]}
    found = jax.device_get(shadow_dejavu.predict(params, signal, order, SIZES))
    truth = shadow_dejavu.in_blocks(np.swapaxes(values[:, :20], 0, 1), order, SIZES)
    assert found.blocks.shape == (20, 2, 6) and found.heads.shape == (20, 2, 4)
    # Labels say only which are large, not by how much: the ranks cannot be had exactly.
    assert shadow_metrics.spearman(found.blocks, truth).mean() > 0.7
    by_hand = [[values[1, 3, order[1, 3 * u : 3 * u + 3]].sum() for u in range(6)]]
    np.testing.assert_allclose(truth[3:4, 1], by_hand)


def test_nth_largest_is_exact():
    draw = np.random.default_rng(0)
    x = draw.integers(0, 5, (7, 40)) * 0.25  # with ties and zeros
    x[1] = draw.random(40) * 1e-30
    for n in (1, 2, 20, 39, 40):
        got = shadow_dejavu._nth(jnp.asarray(x, jnp.float32), n)
        np.testing.assert_array_equal(got[:, 0], np.sort(x.astype(np.float32))[:, -n])
