"""The predictor's folder in transformers gives the same masked logits."""

import dataclasses
import importlib.util
import sys

import jax
import numpy as np
import pytest

from moejax.core import tree
from moejax.evals import masked
from moejax.io.load import Loaded, save_any
from moejax.methods import shadow_dejavu, shadow_mask, shadow_predictor
from moejax.methods.shadow_order import reordered
from moejax.models import transformer
from moejax.models.cache import init_cache
from moejax.models.config import ModelConfig
from moejax.models.families import by_name
from moejax.models.inserted import Inserted
from moejax.models.masked import seen_of

LLAMA = ModelConfig("llama", 61, 3, 32, 48, 4, 2, 8, initializer_range=0.2)
OPT = dataclasses.replace(
    by_name("opt").presets["opt-125m"],
    **{n: getattr(LLAMA, n) for n in ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads")},
    num_kv_heads=4, head_size=8, initializer_range=0.2,
)  # fmt: skip
CONFIGS = {"llama": LLAMA, "opt": OPT}  # OPT's fc2 sees the tokens of both rows in one dim


@pytest.mark.parametrize("variant", ["unified", "token", "dejavu"])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_masked_logits(tmp_path, family, variant):
    import torch
    import transformers

    config, sparsity = CONFIGS[family], (0.5, 0.5)
    sizes = shadow_mask.sizes_of(config, 8)
    draw = np.random.default_rng(0)
    params = transformer.init_params(config, jax.random.key(0))
    save_any(Loaded(jax.device_get(params), config), tmp_path / "model")
    order = np.stack([draw.permutation(48) for _ in range(3)])
    static = shadow_mask.Mask(draw.random((3, sizes.heads)), draw.random((3, sizes.blocks)))
    unified = shadow_predictor.init(jax.random.key(0), 32, 16, static)
    shapes = {name: w.shape for name, w in unified.items()}
    if variant == "dejavu":
        shapes = {f"{part}/w_1": (3, 32, 16) for part in shadow_dejavu.INPUT}
        shapes |= {"heads/w_2": (3, 16, 4), "neurons/w_2": (3, 16, 48)}
    # Small enough that sigmoids do not saturate, where scores would be equal.
    scale = 0.15 if variant == "dejavu" else 1.0
    flat = {n: (scale * draw.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
    weights = tree.unflatten(flat)
    info = shadow_predictor.PredictorInfo(
        "ab" * 32, shadow_predictor.fields_of(config), sizes, "plainact", variant, 16
    )
    made = shadow_predictor.Predictor(info, weights, order, static)
    shadow_predictor.save(tmp_path / "predictor", made)
    spec = importlib.util.spec_from_file_location(
        "modeling_shadow", tmp_path / "predictor" / "modeling_shadow.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["modeling_shadow"] = module
    spec.loader.exec_module(module)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = draw.integers(0, 61, (2, 12))
    shadow = module.attach(model, tmp_path / "predictor", sparsity[0])
    shadow.decide(torch.tensor(ids[:, :7]))
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    moved = reordered(params, config, order)
    prompts = np.array([7, 7], np.int32)
    pairs = [(row[:7].tolist(), row[7:].tolist()) for row in ids]
    if variant == "token":
        watch = Inserted(heads=lambda _, x: (x, x))
        whole = transformer.forward(moved, config, ids, inserted=watch)
        context = seen_of(config, whole.seen)["heads"][0].reshape(2, 12, -1)
        scores = shadow_predictor.predict(weights, context, sizes)
        mask = shadow_mask.select(scores, sizes, sparsity)
        full = jax.tree.map(np.ones_like, mask)
        mask = jax.tree.map(lambda m, f: np.concatenate([f[:, :7], m[:, 7:]], 1), mask, full)
        inserted = shadow_mask.inserted_of(mask, config, sizes)
        ours = transformer.logits(moved, config, ids, inserted=inserted)
    elif variant == "dejavu":
        index, keep = shadow_dejavu.in_order(order, sizes), shadow_dejavu.kept(sizes, sparsity)
        inserted = shadow_dejavu.deciding(weights, config, index, sizes, keep)
        # Of the answer alone, over keys and values of the prompt read densely.
        cache = init_cache(config, np.zeros(2, np.int32), 12)
        first = transformer.forward(moved, config, ids[:, :7], cache=cache)
        rest = transformer.forward(
            moved, config, ids[:, 7:], cache=first.cache, inserted=inserted
        )
        hidden = np.concatenate([first.hidden_BTD, rest.hidden_BTD], axis=1)
        ours = transformer.unembed(moved, config, hidden)
    else:
        read = masked.read_prompts(moved, config, masked.batches(pairs, 200)[0])
        scores = shadow_predictor.predict(weights, read.signals["context"], sizes)
        mask = shadow_mask.select(scores, sizes, sparsity)
        inserted = shadow_mask.inserted_of(mask, config, sizes, prompts)
        ours = transformer.logits(moved, config, ids, inserted=inserted)
    np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-3)
    dense = transformer.logits(params, config, ids)
    assert np.abs(dense - ours)[:, 7:].max() > 0.1
    with torch.no_grad():
        shadow.detach()
        again = model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(again, dense, rtol=1e-3, atol=1e-3)
