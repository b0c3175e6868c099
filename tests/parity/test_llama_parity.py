"""Llama against transformers, live: folders it wrote are read, folders we write are its own."""

import jax
import numpy as np
import pytest

from moejax.core import tree
from moejax.core.precision import TOLERANCE
from moejax.io.load import load_any, save_any
from moejax.models import transformer
from tests.parity import make_goldens
from tests.tiny_llama import CASES, TOKENS, fields_of, tensors_of
from tests.tiny_tokenizer import smollm2_gguf


def ours(loaded, tokens) -> np.ndarray:
    fn = jax.jit(transformer.logits, static_argnums=1)
    return np.asarray(fn(loaded.params, loaded.config, np.asarray(tokens, np.int32)))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.max(np.abs(found - expected)) < TOLERANCE["float32"] * np.max(np.abs(expected))


def from_pretrained(folder, dtype):
    """The folder as transformers loads it; every tensor fits its place and none is left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    import torch

    theirs = make_goldens.llama(fields_of(case), tensors_of(fields_of(case), seed=7))
    expected = make_goldens.logits(theirs, TOKENS)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()

    loaded = load_any(tmp_path / "theirs")
    assert_close(ours(loaded, TOKENS), expected)

    save_any(loaded, tmp_path / "ours")
    again = from_pretrained(tmp_path / "ours", torch.float32)
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    # A fresh model: "dynamic" remembers the longest text it has seen.
    assert np.array_equal(make_goldens.logits(again, TOKENS), expected)
    kept = ("vocab_size", "head_dim", "rope_parameters", "tie_word_embeddings", "rms_norm_eps")
    for field in (*kept, "max_position_embeddings", "attention_bias", "mlp_bias", "hidden_act"):
        written, original = getattr(again.config, field), getattr(theirs.config, field)
        if field == "rope_parameters":
            written = {key: written[key] for key in original}
        assert written == original, field


def test_bfloat16_arrives_as_it_left(tmp_path):
    import torch

    theirs = make_goldens.llama(fields_of("everything"), tensors_of(fields_of("everything")))
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    loaded = load_any(tmp_path / "theirs")
    assert {leaf.dtype.name for leaf in tree.flatten(loaded.params).values()} == {"bfloat16"}
    save_any(loaded, tmp_path / "ours")
    again = from_pretrained(tmp_path / "ours", "auto")
    assert again.dtype == torch.bfloat16
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.slow
def test_smollm2_from_gguf_is_what_transformers_reads_from_it(tmp_path):
    import torch

    theirs = make_goldens.smollm2()
    loaded = load_any(smollm2_gguf())
    save_any(loaded, tmp_path / "ours")
    exported = from_pretrained(tmp_path / "ours", torch.float32)
    for name, value in theirs.state_dict().items():
        assert torch.equal(exported.state_dict()[name], value), name

    text = (
        "def add(a, b):\n    return a + b\n\n# 3141592653589793 tokens, of all kinds: é ß 漢字\n"
        * 2
    )
    tokens = np.array([loaded.tokenizer.encode(text)])
    expected = make_goldens.logits(theirs, tokens)
    assert_close(ours(loaded, tokens), expected)
    assert_close(make_goldens.logits(exported, tokens), expected)
